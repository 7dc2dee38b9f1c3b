"""Check a published repository without a server: digests, configs, parity: python -m export.verify"""

import json
import sys

from export.triton.lint import lint
from runtimes.artifact import Artifact
from runtimes.errors import SlipwayError
from runtimes.host.cli import (
    command,
    existing_folder,
    json_argument,
    mounted_at_argument,
    parser,
    repository_argument,
    table,
)
from runtimes.repository import published


@command
def main(argv: list[str] | None = None) -> int:
    """Print every artifact, whether its parity was verified, and every problem; status 1 if there is one."""
    result = parser("export.verify", __doc__.partition(":")[0] + ".", "", "--repository model_repository --json")
    repository_argument(result)
    mounted_at_argument(result)
    json_argument(result)
    arguments = result.parse_args(argv)
    repository = existing_folder(arguments.repository, "published artifacts")

    rows, problems = [], lint(repository, arguments.mounted_at)
    for folder in published(repository):
        try:
            artifact = Artifact.load(folder)
            artifact.verify_files(folder)
            rows.append({"artifact": str(folder), "proved": artifact.verified, "note": artifact.note})
        except SlipwayError as error:
            rows.append({"artifact": str(folder), "proved": False, "note": str(error)})
            if str(error) not in problems:
                problems.append(str(error))
    if arguments.json:
        print(json.dumps({"artifacts": rows, "problems": problems}))
    else:
        print(table(["artifact", "verified", "note"], [[str(value) for value in row.values()] for row in rows]))
        for problem in problems:
            print(f"problem: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
