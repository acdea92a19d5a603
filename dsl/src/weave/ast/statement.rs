//! The statements, in the order in which a file usually has them.
//!
//! Invariant: lists that the grammar requires (selectors, dims, values, choices) are not empty.

use serde::{Deserialize, Serialize};

use super::{
    AxisRef, Block, Choice, Layout, MeshDef, Name, ScheduleDef, Selector, Spanned, Target,
};
use crate::units::{Number, Quantity};

/// One top-level statement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Statement {
    Plan(Header),
    Model(Definition),
    Cluster(Definition),
    Data(Spanned<Reference>),
    Init(Init),
    Train(Job),
    Infer(Job),
    Mesh(MeshDef),
    Use(UseMesh),
    Tactic(TacticDef),
    Apply(Apply),
    Pin(Pin),
    Forbid(Forbid),
    Prefer(Prefer),
    Place(Place),
    Keep(Keep),
    Schedule(ScheduleDef),
    Pipeline(Pipeline),
    Memory(Block<MemoryItem>),
    Experts(Block<ExpertsItem>),
    Solve(Solve),
}

impl Statement {
    /// The keywords that begin a statement.
    pub const KEYWORDS: [&'static str; 21] = [
        "plan", "model", "cluster", "data", "init", "train", "infer", "mesh", "use", "tactic",
        "apply", "pin", "forbid", "prefer", "place", "keep", "schedule", "pipeline", "memory",
        "experts", "solve",
    ];

    /// The keyword that begins it.
    pub fn keyword(&self) -> &'static str {
        match self {
            Self::Plan(_) => "plan",
            Self::Model(_) => "model",
            Self::Cluster(_) => "cluster",
            Self::Data(_) => "data",
            Self::Init(_) => "init",
            Self::Train(_) => "train",
            Self::Infer(_) => "infer",
            Self::Mesh(_) => "mesh",
            Self::Use(_) => "use",
            Self::Tactic(_) => "tactic",
            Self::Apply(_) => "apply",
            Self::Pin(_) => "pin",
            Self::Forbid(_) => "forbid",
            Self::Prefer(_) => "prefer",
            Self::Place(_) => "place",
            Self::Keep(_) => "keep",
            Self::Schedule(_) => "schedule",
            Self::Pipeline(_) => "pipeline",
            Self::Memory(_) => "memory",
            Self::Experts(_) => "experts",
            Self::Solve(_) => "solve",
        }
    }
}

/// `plan "name" model M cluster C`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub name: Spanned<String>,
    pub model: Spanned<Reference>,
    pub cluster: Spanned<Reference>,
}

/// A file or preset in quotes, or the name of a definition in this file.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    Text(String),
    Name(Name),
}

/// `model NAME = BASE { … }` or `cluster NAME [= BASE] { … }`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Definition {
    pub name: Spanned<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Spanned<Reference>>,
    pub body: Block<SettingLine>,
}

impl Definition {
    /// The first setting of that key, wherever it stands.
    pub fn get(&self, key: &str) -> Option<&Spanned<Setting>> {
        self.settings().find(|setting| setting.key == key)
    }

    /// All settings, in order.
    pub fn settings(&self) -> impl Iterator<Item = &Spanned<Setting>> {
        self.body.items().flat_map(|line| &line.node.settings)
    }
}

/// One line of a definition: a main setting and those that qualify it, as in
/// `link nvlink 450 GB/s 2 us within node`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SettingLine {
    /// At least one.
    pub settings: Vec<Spanned<Setting>>,
}

/// A key and its values: the first may be anything, the others are neither words nor choices of
/// words (a word there is the next key).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// Never the name of a unit.
    pub key: Name,
    /// At least one.
    pub values: Vec<Spanned<Choice<Value>>>,
}

impl Setting {
    /// Its only value, if it is one and known.
    pub fn value(&self) -> Option<&Value> {
        match self.values.as_slice() {
            [value] => value.known(),
            _ => None,
        }
    }
}

/// The value of a setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    Word(Name),
    Number(Number),
    Quantity(Quantity),
    Text(String),
}

impl Value {
    /// As a count.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Number(number) => number.as_u64(),
            _ => None,
        }
    }

    /// As a plain number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(number.as_f64()),
            _ => None,
        }
    }

    /// As `true` or `false`.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Word(name) if *name == "true" => Some(true),
            Self::Word(name) if *name == "false" => Some(false),
            _ => None,
        }
    }

    /// As a word or a quoted text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Word(name) => Some(name.as_str()),
            Self::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// `init golden`, `init random seed 1`, `init load "folder"`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    Golden,
    Random { seed: Option<u64> },
    Load { path: String },
}

/// `train …` or `infer …`: settings on one line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Job {
    /// At least one.
    pub settings: Vec<Spanned<Setting>>,
}

impl Job {
    /// The first setting of that key.
    pub fn get(&self, key: &str) -> Option<&Spanned<Setting>> {
        self.settings.iter().find(|setting| setting.key == key)
    }
}

/// `use MESH on SELECTORS`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UseMesh {
    pub mesh: Spanned<Name>,
    pub on: Vec<Spanned<Selector>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overrides: bool,
}

/// `tactic NAME(PARAMS) { … }`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TacticDef {
    pub name: Spanned<Name>,
    pub params: Vec<Spanned<Name>>,
    pub body: Block<TacticItem>,
}

/// A statement within a tactic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TacticItem {
    Shard(Shard),
    Apply(Apply),
    Pin(Pin),
    Forbid(Forbid),
    Prefer(Prefer),
}

/// `shard DIMS over AXES on TARGETS [except SELECTORS]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shard {
    pub dims: Vec<Spanned<Name>>,
    pub over: Vec<Spanned<AxisRef>>,
    pub on: Vec<Spanned<Target>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub except: Vec<Spanned<Selector>>,
}

/// `apply TACTIC(ARGS) [except SELECTORS]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Apply {
    pub tactic: Spanned<Name>,
    pub args: Vec<Spanned<Choice<Arg>>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub except: Vec<Spanned<Selector>>,
}

/// An argument of a tactic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arg {
    Number(Number),
    /// An axis or a parameter.
    Axis(AxisRef),
    Text(String),
}

/// `pin SELECTOR : LAYOUT`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pin {
    pub on: Spanned<Selector>,
    pub layout: Spanned<Choice<Layout>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overrides: bool,
}

/// `forbid SELECTOR : LAYOUT`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Forbid {
    pub on: Spanned<Selector>,
    pub layout: Spanned<Layout>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overrides: bool,
}

/// `prefer SELECTOR.KEY = CHOICE over CHOICE weight N`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prefer {
    pub on: Spanned<Selector>,
    pub key: Spanned<Name>,
    /// Best first; at least one.
    pub ranking: Vec<Spanned<Call>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Number>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overrides: bool,
}

/// `place SELECTOR : FACTORS`: how the planner divided ops, complete.
///
/// The layout's dims are factors of the ops' sharding rules; factors that no axis divides are left
/// out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Place {
    pub on: Spanned<Selector>,
    pub factors: Spanned<Layout>,
}

/// `keep SELECTOR : LAYOUT`: how the planner keeps inputs, parameters, states and constants.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Keep {
    pub on: Spanned<Selector>,
    pub layout: Spanned<Layout>,
}

/// `ring(cp)` or a bare name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Call {
    pub name: Name,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<AxisRef>,
}

/// `pipeline AXIS { … }`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pipeline {
    pub over: Spanned<AxisRef>,
    pub body: Block<PipelineItem>,
}

/// A line of `pipeline`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PipelineItem {
    /// Chunks (virtual stages) a rank.
    Chunks(Choice<u64>),
    /// `cut before SELECTORS`: each begins a stage.
    CutBefore(Choice<Vec<Spanned<Selector>>>),
    Schedule(Choice<Name>),
    Microbatches(Choice<u64>),
    /// Parts of every sequence, for schedules that divide sequences.
    Slices(Choice<u64>),
    /// `ranks (0,1,1,0)`: the rank of every stage; not empty.
    Ranks(Vec<u64>),
    /// `empty stages`: a block that is named for several cuts begins the last of those stages, and the
    /// others are empty.
    EmptyStages,
}

/// A line of `memory`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryItem {
    /// Bytes a device.
    Budget(Choice<Quantity>),
    /// Part of the device's memory that a plan leaves free.
    Headroom(Choice<Quantity>),
    Recompute(Recompute),
    Offload(Offload),
}

/// `recompute SELECTOR = POLICY`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recompute {
    pub on: Spanned<Selector>,
    pub policy: Choice<RecomputePolicy>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overrides: bool,
}

/// What is computed again in the backward pass instead of being kept.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecomputePolicy {
    None,
    Full,
    /// `first 4`: so many of the selected layers of every pipeline rank, the first ones; or one
    /// number a rank, `first (4,3,2,1)`. At least one number.
    First(Vec<u64>),
}

impl RecomputePolicy {
    /// The policies without numbers.
    pub const ALL: [Self; 2] = [Self::None, Self::Full];
}

/// `offload TARGET = PLACE`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offload {
    pub on: Spanned<Target>,
    pub to: Choice<OffloadTo>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overrides: bool,
}

/// Where offloaded tensors live.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OffloadTo {
    /// On the device.
    None,
    /// In the host's memory.
    Host,
    /// `host 50 %`: this part of them in the host's memory.
    Part(Quantity),
}

impl OffloadTo {
    /// The places without a part.
    pub const ALL: [Self; 2] = [Self::None, Self::Host];
}

/// A line of `experts`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertsItem {
    Placement(Placement),
    Dispatch(Choice<Dispatch>),
    /// How often a token travels in a layer.
    Exchanges(Choice<Exchanges>),
}

/// `placement METHOD [trace "file"] [slots N]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    pub method: Choice<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<Spanned<String>>,
    /// Experts that a device holds in a layer; more than its share makes replicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<Spanned<u64>>,
}

/// How tokens that overflow an expert are treated.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dispatch {
    /// None is dropped.
    Dropless,
    /// `capacity N`: each expert takes N times its fair share.
    Capacity(Number),
}

/// Exchanges of tokens in a layer with experts, in inference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exchanges {
    /// Tokens stay with their experts until the next ones; keys and values are everywhere.
    One,
    /// Tokens go to their experts and come home.
    Two,
}

impl Exchanges {
    /// Both.
    pub const ALL: [Self; 2] = [Self::One, Self::Two];

    /// The spelling in the language.
    pub fn text(self) -> &'static str {
        match self {
            Self::One => "one",
            Self::Two => "two",
        }
    }
}

/// `solve minimize OBJECTIVE [within TIME] [gap PERCENT]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Solve {
    pub goal: Goal,
    pub objective: Spanned<Name>,
    /// A time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<Quantity>,
    /// A ratio.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap: Option<Quantity>,
}

/// The direction of the objective.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    Minimize,
    Maximize,
}

impl Goal {
    /// Both directions.
    pub const ALL: [Self; 2] = [Self::Minimize, Self::Maximize];

    /// The spelling in the language.
    pub fn text(self) -> &'static str {
        match self {
            Self::Minimize => "minimize",
            Self::Maximize => "maximize",
        }
    }
}
