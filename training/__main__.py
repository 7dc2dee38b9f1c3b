"""Lists the commands of this package: python -m training"""

from pathlib import Path

from runtimes.host.cli import command_table

if __name__ == "__main__":
    print(command_table(Path(__file__).parent))
