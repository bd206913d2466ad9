"""What several test folders need: a gateway on real sockets inside the test's event loop."""
