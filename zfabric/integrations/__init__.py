"""zfabric under other libraries, one room each; nothing here is imported by `import zfabric`."""
