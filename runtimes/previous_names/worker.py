"""`runtimes.bench.worker` under its name before 0.2: older checkouts start it in `runtimes.compare`."""

from runtimes.bench.worker import main

if __name__ == "__main__":
    main()
