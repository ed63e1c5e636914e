"""To come."""

MEASURES = ()
