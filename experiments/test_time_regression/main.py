"""Test-time regression, from config to figure: `experiments/run_study.py` under another name.

    python experiments/test_time_regression/main.py --config=configs/test_time_regression.py \\
        --workdir=runs/test_time_regression
"""

from lla.experiments import run_study

if __name__ == "__main__":
    run_study.run()
