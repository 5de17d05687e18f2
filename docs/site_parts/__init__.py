"""What the site needs beyond Sphinx: `docs/conf.py` lists these as extensions."""
