"""One file a section of the config: its keys as a pydantic model, `resolve`, and what it comes to.

What a section comes to is a frozen dataclass. Its fields are what ranks must agree on, unless `may_differ` marks them.
"""
