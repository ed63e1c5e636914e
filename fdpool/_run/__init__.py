"""The verb `fdpool run`."""
