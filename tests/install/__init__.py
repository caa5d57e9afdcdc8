"""``make test-install``: the built package in empty environments, every command once."""
