"""The site: what `make site` adds to docs/ so that it builds as one."""
