"""The garden: links, simulator, benches, contract suites, for whoever wants to test with them."""
