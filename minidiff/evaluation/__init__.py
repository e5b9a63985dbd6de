"""How good are the pictures: the judge, metrics, the report, likelihood."""
