"""`runtimes.bench.worker` under its name in version 0.1, whose `runtimes.compare` looks for this very file."""

from runtimes.bench.worker import main

if __name__ == "__main__":
    main()
