"""Where the evidence lies in a checkout of this project.  An installed wheel has none of it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
RUNS = DATA / "runs"                    # data/runs/SUITE/*.jsonl: the records
SUITES = DATA / "suites"                # data/suites/SUITE.toml: what was asked
CLAIMS_TOML = DATA / "claims.toml"      # the register: what the book claims, fixed beforehand
CLAIMS_JSON = DATA / "claims.json"      # what the records say about each claim
RETIRED = DATA / "retired"              # claims that were taken out, claims.toml, with their records, runs/
NOTEBOOKS = ROOT / "notebooks"
