"""What checks arguments and results where the tests run with shapes checked (scripts/test.sh)."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int may stand where a float is asked for, as everywhere in Python."""
