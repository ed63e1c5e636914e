"""What the pytest plugin is made of; its door is `fdpool.pytest_plugin`."""
