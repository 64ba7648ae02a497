"""From a request path to an open file, and from its facts to a response."""
