//! Top-level statements, and the blocks that only they have.

use super::block::BlockKind;
use super::{Empty, Parse, Parser};
use crate::diagnostics::{Diagnostic, nearest};
use crate::units::Measure;
use crate::weave::ast::{
    Definition, Dispatch, Exchanges, ExpertsItem, Goal, Header, Init, Job, MemoryItem, Offload,
    OffloadTo, Pipeline, PipelineItem, Placement, Recompute, RecomputePolicy, Selector, Setting,
    Solve, Spanned, Statement,
};
use crate::weave::lexer::Tok;

const MODEL: BlockKind = BlockKind {
    name: "model",
    keywords: &[],
};
const CLUSTER: BlockKind = BlockKind {
    name: "cluster",
    keywords: &[],
};
const PIPELINE: BlockKind = BlockKind {
    name: "pipeline",
    keywords: &[
        "chunks",
        "cut",
        "schedule",
        "microbatches",
        "slices",
        "ranks",
        "empty",
    ],
};
const MEMORY: BlockKind = BlockKind {
    name: "memory",
    keywords: &["budget", "headroom", "recompute", "offload"],
};
const EXPERTS: BlockKind = BlockKind {
    name: "experts",
    keywords: &["placement", "dispatch", "exchanges"],
};

impl<'a> Parser<'a> {
    pub(in crate::weave) fn statement(&mut self) -> Parse<Statement> {
        let keyword = self.here();
        if *self.peek() != Tok::Word || !Statement::KEYWORDS.contains(&keyword) {
            return Err(self.unknown_statement());
        }
        self.advance();
        match keyword {
            "plan" => self.header().map(Statement::Plan),
            "model" => self.definition(MODEL).map(Statement::Model),
            "cluster" => self.definition(CLUSTER).map(Statement::Cluster),
            "data" => self
                .spanned(|p| p.reference("a file in quotes, or `golden`"))
                .map(Statement::Data),
            "init" => self.init().map(Statement::Init),
            "train" => self.job().map(Statement::Train),
            "infer" => self.job().map(Statement::Infer),
            "mesh" => self.mesh().map(Statement::Mesh),
            "use" => self.use_mesh().map(Statement::Use),
            "tactic" => self.tactic().map(Statement::Tactic),
            "apply" => self.apply().map(Statement::Apply),
            "pin" => self.pin().map(Statement::Pin),
            "forbid" => self.forbid().map(Statement::Forbid),
            "prefer" => self.prefer().map(Statement::Prefer),
            "place" => self.place().map(Statement::Place),
            "keep" => self.keep().map(Statement::Keep),
            "schedule" => self.schedule().map(Statement::Schedule),
            "pipeline" => self.pipeline().map(Statement::Pipeline),
            "memory" => self.memory().map(Statement::Memory),
            "experts" => self.experts().map(Statement::Experts),
            // `KEYWORDS` and this match list the same words.
            _ => self.solve().map(Statement::Solve),
        }
    }

    fn unknown_statement(&mut self) -> super::Stop {
        let span = self.span();
        let word = self.here();
        if *self.peek() != Tok::Word {
            let diagnostic = self
                .unexpected_diagnostic("a statement")
                .help(format!("statements are {}", Statement::KEYWORDS.join(", ")));
            return self.report(diagnostic);
        }
        let mut diagnostic = Diagnostic::invalid(format!("unknown statement `{word}`"))
            .code("W003")
            .at(span, "not a statement");
        let home = [PIPELINE, MEMORY, EXPERTS]
            .into_iter()
            .find(|kind| kind.keywords.contains(&word));
        diagnostic = match (nearest(word, Statement::KEYWORDS), home) {
            (_, Some(home)) => {
                diagnostic.help(format!("`{word}` belongs in a {} block", home.name))
            }
            _ if word == "shard" => diagnostic.help("`shard` belongs in a tactic"),
            (Some(near), _) => diagnostic.fix(span, near, format!("did you mean `{near}`?")),
            _ => diagnostic.help(format!("statements are {}", Statement::KEYWORDS.join(", "))),
        };
        self.report(diagnostic)
    }

    /// `"name" model M cluster C`
    fn header(&mut self) -> Parse<Header> {
        let name = self.spanned(|p| p.text_value("the plan's name in quotes"))?;
        self.expect_word("model")?;
        let model = self.spanned(|p| p.reference("a model: a file in quotes, or a name"))?;
        self.expect_word("cluster")?;
        let cluster =
            self.spanned(|p| p.reference("a cluster: a file or preset in quotes, or a name"))?;
        Ok(Header {
            name,
            model,
            cluster,
        })
    }

    /// `NAME [= BASE] { … }`; a model's base is required.
    fn definition(&mut self, kind: BlockKind) -> Parse<Definition> {
        let what = format!("the name of the {}", kind.name);
        let name = self.spanned(|p| p.name_as(&what))?;
        let base = if self.eat("=") {
            Some(self.spanned(|p| p.reference("a family or preset, or a file in quotes"))?)
        } else if kind.name == MODEL.name {
            let diagnostic = self
                .unexpected_diagnostic("`=` and the family of the model")
                .help(format!("as in `model {} = llama {{`", name.node));
            return Err(self.report(diagnostic));
        } else {
            None
        };
        let body = self.block(kind, Self::setting_line)?;
        Ok(Definition { name, base, body })
    }

    fn init(&mut self) -> Parse<Init> {
        if self.eat_word("golden") {
            return Ok(Init::Golden);
        }
        if self.eat_word("random") {
            let mut seed = None;
            if self.eat_word("seed") {
                seed = Some(self.count("a seed")?);
            }
            return Ok(Init::Random { seed });
        }
        if self.eat_word("load") {
            let path = self.text_value("the path in quotes")?;
            return Ok(Init::Load { path });
        }
        Err(self.unexpected_word("a way to initialize", &["golden", "random", "load"]))
    }

    fn job(&mut self) -> Parse<Job> {
        let settings = self.settings()?;
        let mut seen: Vec<&Spanned<Setting>> = Vec::new();
        let mut twice = Vec::new();
        for setting in &settings {
            match seen.iter().find(|earlier| earlier.key == setting.key) {
                Some(first) => twice.push(
                    Diagnostic::invalid(format!("`{}` is given twice", setting.key))
                        .code("W006")
                        .at(setting.span, "again here")
                        .also(first.span, "first here"),
                ),
                None => seen.push(setting),
            }
        }
        self.diagnostics.extend(twice);
        Ok(Job { settings })
    }

    fn pipeline(&mut self) -> Parse<Pipeline> {
        let over = self.spanned(Self::axis_ref)?;
        let body = self.block(PIPELINE, Self::pipeline_item)?;
        self.only_once(&body, |item| {
            Some(match item {
                PipelineItem::Chunks(_) => "chunks",
                PipelineItem::CutBefore(_) => "cut",
                PipelineItem::Schedule(_) => "schedule",
                PipelineItem::Microbatches(_) => "microbatches",
                PipelineItem::Slices(_) => "slices",
                PipelineItem::Ranks(_) => "ranks",
                PipelineItem::EmptyStages => "empty",
            })
        });
        Ok(Pipeline { over, body })
    }

    fn pipeline_item(&mut self) -> Parse<PipelineItem> {
        if self.eat_word("chunks") {
            let chunks = self.choice(|p| p.positive("a number of chunks from 1"))?;
            return Ok(PipelineItem::Chunks(chunks));
        }
        if self.eat_word("cut") {
            self.expect_word("before")?;
            return self.cuts().map(PipelineItem::CutBefore);
        }
        if self.eat_word("schedule") {
            let schedule = self.choice(|p| p.name_as("the name of a schedule"))?;
            if self.is_sign("=") {
                let diagnostic = self
                    .unexpected_diagnostic("the end of the line")
                    .help("define the schedule outside of the pipeline block, and name it here");
                return Err(self.report(diagnostic));
            }
            return Ok(PipelineItem::Schedule(schedule));
        }
        if self.eat_word("microbatches") {
            let microbatches = self.choice(|p| p.positive("a number of microbatches from 1"))?;
            return Ok(PipelineItem::Microbatches(microbatches));
        }
        if self.eat_word("slices") {
            let slices = self.choice(|p| p.positive("a number of slices from 1"))?;
            return Ok(PipelineItem::Slices(slices));
        }
        if self.eat_word("ranks") {
            let ranks = self.parenthesized(Empty::Refused, |p| p.count("a rank"))?;
            return Ok(PipelineItem::Ranks(ranks));
        }
        if self.eat_word("empty") {
            self.expect_word("stages")?;
            return Ok(PipelineItem::EmptyStages);
        }
        Err(self.unknown_line(PIPELINE))
    }

    /// A list of selectors; among the choices of an `auto` each list stands in parentheses.
    fn cuts(&mut self) -> Parse<crate::weave::ast::Choice<Vec<Spanned<Selector>>>> {
        self.choice(|p| {
            if p.is_sign("(") {
                return p.parenthesized(Empty::Refused, |p| p.spanned(Self::selector));
            }
            p.selectors()
        })
    }

    fn memory(&mut self) -> Parse<crate::weave::ast::Block<MemoryItem>> {
        let body = self.block(MEMORY, Self::memory_item)?;
        self.only_once(&body, |item| match item {
            MemoryItem::Budget(_) => Some("budget"),
            MemoryItem::Headroom(_) => Some("headroom"),
            MemoryItem::Recompute(_) | MemoryItem::Offload(_) => None,
        });
        Ok(body)
    }

    fn memory_item(&mut self) -> Parse<MemoryItem> {
        if self.eat_word("budget") {
            let budget = self.choice(|p| p.quantity(Measure::Bytes))?;
            return Ok(MemoryItem::Budget(budget));
        }
        if self.eat_word("headroom") {
            let headroom = self.choice(|p| p.quantity(Measure::Ratio))?;
            return Ok(MemoryItem::Headroom(headroom));
        }
        if self.eat_word("recompute") {
            let on = self.spanned(Self::selector)?;
            self.expect("=")?;
            let policy = self.choice(Self::recompute_policy)?;
            let overrides = self.overrides();
            return Ok(MemoryItem::Recompute(Recompute {
                on,
                policy,
                overrides,
            }));
        }
        if self.eat_word("offload") {
            let on = self.spanned(Self::target)?;
            self.expect("=")?;
            let to = self.choice(Self::offload_to)?;
            let overrides = self.overrides();
            return Ok(MemoryItem::Offload(Offload { on, to, overrides }));
        }
        Err(self.unknown_line(MEMORY))
    }

    /// `none`, `full`, `first 4`, `first (4,3)`
    fn recompute_policy(&mut self) -> Parse<RecomputePolicy> {
        if self.eat_word("none") {
            return Ok(RecomputePolicy::None);
        }
        if self.eat_word("full") {
            return Ok(RecomputePolicy::Full);
        }
        if self.eat_word("first") {
            let what = "a number of layers";
            let counts = if self.is_sign("(") {
                self.parenthesized(Empty::Refused, |p| p.count(what))?
            } else {
                vec![self.count(what)?]
            };
            return Ok(RecomputePolicy::First(counts));
        }
        Err(self.unexpected_word("a policy", &["none", "full", "first"]))
    }

    /// `none`, `host`, `host 50 %`
    fn offload_to(&mut self) -> Parse<OffloadTo> {
        if self.eat_word("none") {
            return Ok(OffloadTo::None);
        }
        if self.eat_word("host") {
            return Ok(match self.peek() {
                Tok::Number => OffloadTo::Part(self.quantity(Measure::Ratio)?),
                _ => OffloadTo::Host,
            });
        }
        Err(self.unexpected_word("a place", &["none", "host"]))
    }

    fn experts(&mut self) -> Parse<crate::weave::ast::Block<ExpertsItem>> {
        let body = self.block(EXPERTS, Self::experts_item)?;
        self.only_once(&body, |item| {
            Some(match item {
                ExpertsItem::Placement(_) => "placement",
                ExpertsItem::Dispatch(_) => "dispatch",
                ExpertsItem::Exchanges(_) => "exchanges",
            })
        });
        Ok(body)
    }

    fn experts_item(&mut self) -> Parse<ExpertsItem> {
        if self.eat_word("placement") {
            let method = self.choice(|p| p.name_as("a way to place experts"))?;
            let mut trace = None;
            if self.eat_word("trace") {
                trace = Some(self.spanned(|p| p.text_value("the file in quotes"))?);
            }
            let mut slots = None;
            if self.eat_word("slots") {
                slots = Some(self.spanned(|p| p.positive("a number of slots from 1"))?);
            }
            return Ok(ExpertsItem::Placement(Placement {
                method,
                trace,
                slots,
            }));
        }
        if self.eat_word("dispatch") {
            return self.choice(Self::dispatch).map(ExpertsItem::Dispatch);
        }
        if self.eat_word("exchanges") {
            let one = |p: &mut Self| p.one_of("how many", &Exchanges::ALL, Exchanges::text);
            return self.choice(one).map(ExpertsItem::Exchanges);
        }
        Err(self.unknown_line(EXPERTS))
    }

    fn dispatch(&mut self) -> Parse<Dispatch> {
        if self.eat_word("dropless") {
            return Ok(Dispatch::Dropless);
        }
        if self.eat_word("capacity") {
            let begin = self.span();
            let factor = self.number("a capacity factor")?;
            if factor.as_f64() <= 0.0 {
                let span = begin.to(self.last_span());
                let message = format!("a capacity factor is positive, found {factor}");
                return Err(self.fail("W005", message, span));
            }
            return Ok(Dispatch::Capacity(factor));
        }
        Err(self.unexpected_word("a way to dispatch", &["dropless", "capacity"]))
    }

    /// `minimize OBJECTIVE [within TIME] [gap PERCENT]`
    fn solve(&mut self) -> Parse<Solve> {
        let goal = self.one_of("a goal", &Goal::ALL, Goal::text)?;
        let objective = self.spanned(|p| p.name_as("an objective, such as `step_time`"))?;
        let (mut within, mut gap) = (None, None);
        while !self.at_end_of_statement() {
            let span = self.span();
            let (word, slot, measure) = if self.is_word("within") {
                ("within", &mut within, Measure::Time)
            } else if self.is_word("gap") {
                ("gap", &mut gap, Measure::Ratio)
            } else {
                return Err(self.unexpected_word("a limit", &["within", "gap"]));
            };
            if slot.is_some() {
                return Err(self.fail("W006", format!("`{word}` is given twice"), span));
            }
            self.advance();
            *slot = Some(self.quantity(measure)?);
        }
        Ok(Solve {
            goal,
            objective,
            within,
            gap,
        })
    }
}
