"""``python -m experiments`` is ``groundscope``."""

from experiments.app import main

if __name__ == "__main__":
    main()
