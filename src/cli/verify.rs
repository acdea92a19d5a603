//! `meshweave verify`.

use clap::Args;
use meshweave_compiler::resolve::Planner;
use meshweave_dsl::diagnostics::Class;
use serde_json::json;

use super::experts::with_replicas;
use super::render::{bytes, seconds};
use super::{Format, Input};
use crate::cli::output::outln;
use crate::error::{Error, Result};
use crate::mapping::{Mapped, Stated};
use crate::session::Session;

#[derive(Debug, Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    input: Input,
}

/// One thing that a plan must stand.
struct Check {
    name: &'static str,
    /// Whether it holds; `None` for what the plan does not say.
    holds: Option<bool>,
    detail: String,
}

/// Checks a plan again without a search: legality, memory, price, bound, hashes.
///
/// # Errors
/// A plan that is not complete, not legal, or breaks a check.
pub fn verify(args: &VerifyArgs, format: Format) -> Result<()> {
    let session = Session::open(&args.input.document, args.input.cluster.as_deref())?;
    let checks = match args.input.planner(&session)? {
        Planner::Mapping => checks_of_mapping(&session)?,
        Planner::Ops => checks_of_ops(&session)?,
    };
    match format {
        Format::Text => {
            for check in &checks {
                let mark = match check.holds {
                    Some(true) => "ok",
                    Some(false) => "NO",
                    None => "-",
                };
                outln!("{mark:<3} {:<9} {}", check.name, check.detail);
            }
        }
        Format::Json => {
            let checks: Vec<_> = checks
                .iter()
                .map(|check| json!({"check": check.name, "holds": check.holds, "detail": check.detail}))
                .collect();
            outln!("{}", json!({"checks": checks}));
        }
    }
    let broken: Vec<&str> = checks
        .iter()
        .filter(|check| check.holds == Some(false))
        .map(|check| check.name)
        .collect();
    if broken.is_empty() {
        return Ok(());
    }
    Err(Error::plain(
        Class::Infeasible,
        format!("the plan does not hold: {}", broken.join(", ")),
    )
    .help("plan again with `meshweave plan`, which starts from this plan's decisions"))
}

fn checks_of_mapping(session: &Session) -> Result<Vec<Check>> {
    let mapped = session.read_mapping()?;
    let stated = Stated::of(&session.document);
    let mut checks = vec![Check {
        name: "legality",
        holds: Some(true),
        detail: format!("{} on {}", mapped.mapping, mapped.request.cluster),
    }];
    checks.push(memory_check(&mapped));
    let price_s = mapped.estimate.step_s;
    checks.push(match stated.predicted_s {
        None => Check {
            name: "price",
            holds: None,
            detail: format!("{} (predicted); the plan states none", seconds(price_s)),
        },
        Some(stated_s) => Check {
            name: "price",
            holds: Some((stated_s / price_s - 1.0).abs() < 1e-4),
            detail: format!(
                "{} (predicted), {} stated",
                seconds(price_s),
                seconds(stated_s)
            ),
        },
    });
    checks.push(match stated.bound_s {
        None => Check {
            name: "bound",
            holds: None,
            detail: "the plan states none".into(),
        },
        Some(bound_s) => Check {
            name: "bound",
            holds: Some(bound_s <= price_s * (1.0 + 1e-4)),
            detail: format!(
                "{} stated, gap {:.2} %; it is proven by the search alone (`meshweave plan`)",
                seconds(bound_s),
                100.0 * (price_s / bound_s - 1.0).max(0.0)
            ),
        },
    });
    if let Some(most_s) = mapped.request.space().most_s {
        checks.push(Check {
            name: "latency",
            holds: Some(price_s <= most_s),
            detail: format!(
                "{} (predicted) of {} allowed",
                seconds(price_s),
                seconds(most_s)
            ),
        });
    }
    let own = mapped.digests();
    let hashes = [
        ("model", stated.model, own.model),
        ("cluster", stated.cluster, own.cluster),
        ("prices", stated.prices, own.prices),
    ];
    for (name, stated, own) in hashes {
        checks.push(Check {
            name,
            holds: stated.as_ref().map(|stated| *stated == own),
            detail: match stated {
                None => "the plan states no hash".into(),
                Some(stated) if stated == own => format!("hash {own}"),
                Some(stated) => {
                    format!("hash {own}, {stated} when it was planned: it was changed since")
                }
            },
        });
    }
    Ok(checks)
}

fn memory_check(mapped: &Mapped) -> Check {
    let (ranks, budgets) = (mapped.memory_bytes(), mapped.budgets());
    // The rank with least room, which may be negative.
    let both = ranks.iter().copied().zip(budgets).enumerate();
    let worst = both.min_by_key(|(_, (bytes, budget))| i128::from(*budget) - i128::from(*bytes));
    let (rank, (most, budget)) = worst.unwrap_or_default();
    Check {
        name: "memory",
        holds: Some(most <= budget),
        detail: format!(
            "{} on pipeline rank {rank} (predicted) of {} allowed",
            bytes(most as f64),
            bytes(budget as f64)
        ),
    }
}

fn checks_of_ops(session: &Session) -> Result<Vec<Check>> {
    let session = with_replicas(session.clone())?;
    let model = session.model()?;
    let directives = session.directives(&model)?;
    if directives.replay.is_none() {
        return Err(
            Error::plain(Class::Invalid, "the document is no plan: it places no ops")
                .help("`meshweave plan -o plan.weave` writes one"),
        );
    }
    let solution = session.plan(&model)?;
    let certificate = &solution.certificate;
    Ok(vec![
        Check {
            name: "legality",
            holds: Some(true),
            detail: format!("mesh {}", solution.plan.mesh),
        },
        Check {
            name: "memory",
            holds: Some(certificate.memory.peak_bytes() <= certificate.budget_bytes),
            detail: format!(
                "{} a device (predicted) of {} allowed",
                bytes(certificate.memory.peak_bytes()),
                bytes(certificate.budget_bytes)
            ),
        },
        Check {
            name: "price",
            holds: None,
            detail: format!("{} (predicted)", seconds(certificate.predicted_s)),
        },
        Check {
            name: "bound",
            holds: Some(certificate.lower_bound_s <= certificate.predicted_s),
            detail: format!("{} without a search", seconds(certificate.lower_bound_s)),
        },
    ])
}
