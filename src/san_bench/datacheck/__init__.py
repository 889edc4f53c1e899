"""What data must be, and how it differs: manifests, problems, checks, fetching."""
