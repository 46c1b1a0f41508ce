"""`unmask serve` against random requests made from its own OpenAPI schema: no fault of it, no error undocumented.

    python benchmarks/serve_schema.py runs/q --examples 100

Needs the package schemathesis. Every answer must have a status and a body that the schema describes, and none is 500.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import unmask

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from serving import running

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with running(unmask.load(args.model), max_new_tokens=32, deadline=30) as address:
        command = ["schemathesis", "run", f"{address}/openapi.json", "--checks", CHECKS, "--seed", str(args.seed),
                   "--max-examples", str(args.examples), "--request-timeout", "60"]  # fmt: skip
        found = Path(sys.executable).with_name(command[0])
        raise SystemExit(subprocess.run([str(found), *command[1:]], check=False).returncode)


if __name__ == "__main__":
    main()
