"""The garden: links, simulator, benches and contract suites, for whoever wants to test with them."""
