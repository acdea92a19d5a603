//! Types with a text form.
