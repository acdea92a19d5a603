//! The types of Meshweave that have a text form, in the order in which data flows through them.
//!
//! Enters: text. Leaves: text.
//! In between: graphs, clusters, meshes, layouts, directives, plans, programs, timelines.

pub mod diagnostics;
pub mod units;
pub mod weave;
pub mod name;
pub mod dtype;
pub mod op;
pub mod graph;
pub mod build;
pub mod weights;
pub mod cluster;
pub mod layout;
pub mod fold;
pub mod mapping;
pub mod schedule;
pub mod plan;
pub mod pipeline;
pub mod program;
pub mod device_code;
pub mod timeline;
pub mod trace;
pub mod placement;
