"""The verb `fdpool serve`."""
