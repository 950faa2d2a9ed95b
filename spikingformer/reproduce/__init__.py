"""Published tables and our own claims: what each needs, rerunning it, and the page of results made from its files."""
