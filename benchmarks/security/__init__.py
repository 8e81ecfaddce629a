"""What keys cost: transfers over one and two connections, and lone calls, plain and encrypted."""
