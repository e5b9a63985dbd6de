"""JSON files that any reader takes."""

import json
import math

from minidiff.files import write_json


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"fid": math.nan, "rates": [1.5, -math.inf], "options": {"scale": math.inf, "steps": 3}})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")
    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "fid": None, "rates": [1.5, None], "options": {"scale": None, "steps": 3}}
