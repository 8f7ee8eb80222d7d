//! Reaching a guest: connect, execute, copy, keys.
