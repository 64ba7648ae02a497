"""`ktlsd bench`: what encrypting in the kernel is worth on this machine, and how ktlsd stands against other servers."""
