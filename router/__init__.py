"""The router: knows the nodes of each region, and sends each client to the nearest one."""
