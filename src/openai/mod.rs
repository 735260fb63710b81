//! The OpenAI API: bytes in, bytes out.
