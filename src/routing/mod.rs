//! WHO gets a request. Pure and synchronous: time and random numbers come in, decisions come out.
