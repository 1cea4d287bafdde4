"""`python -m ess_monitor.cli`."""

from ess_monitor.cli.main import main

if __name__ == "__main__":
    main()
