//! Meshweave.
