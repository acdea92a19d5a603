//! Traces that other engines recorded.
