"""`python -m rlhf_cli` is the same as `rlhf`."""

from rlhf_cli.cli.main import main

if __name__ == "__main__":
    main()
