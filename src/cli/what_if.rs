//! `meshweave what-if`.

use clap::Args;
use meshweave_compiler::plan::outer::compare::{Change, changed, differences};
use meshweave_compiler::resolve::Planner;
use meshweave_dsl::diagnostics::Class;
use serde_json::json;

use super::render::{plan_summary, seconds};
use super::{Format, Input};
use crate::cli::output::{out, outln};
use crate::error::{Error, Result};
use crate::mapping::{grouped, summary};
use crate::session::Session;

#[derive(Debug, Args)]
pub struct WhatIfArgs {
    #[command(flatten)]
    input: Input,
    /// A device's memory, as in `x2` or `+50%`.
    #[arg(long, value_parser = factor, default_value = "x1", allow_hyphen_values = true)]
    memory: f64,
    /// Bandwidth between nodes.
    #[arg(long, value_parser = factor, default_value = "x1", allow_hyphen_values = true)]
    network: f64,
    /// Bandwidth within a node.
    #[arg(long, value_parser = factor, default_value = "x1", allow_hyphen_values = true)]
    links: f64,
    /// Operations a second.
    #[arg(long, value_parser = factor, default_value = "x1", allow_hyphen_values = true)]
    compute: f64,
    /// Number of devices, in whole nodes.
    #[arg(long, value_parser = factor, default_value = "x1", allow_hyphen_values = true)]
    devices: f64,
}

/// `x2`, `2`, `+20%`, `-10%` as a factor.
fn factor(text: &str) -> std::result::Result<f64, String> {
    let wrong = || format!("`{text}` is no change; write `x2`, `x0.5` or `+20%`");
    let value = match text.strip_suffix('%') {
        Some(percent) => 1.0 + percent.trim().parse::<f64>().map_err(|_| wrong())? / 100.0,
        None => text
            .trim_start_matches(['x', '×'])
            .parse()
            .map_err(|_| wrong())?,
    };
    if value > 0.0 && value.is_finite() {
        Ok(value)
    } else {
        Err(wrong())
    }
}

/// Plans on a changed cluster, beside the plan on the document's own.
///
/// # Errors
/// See `plan`.
pub fn what_if(args: &WhatIfArgs, format: Format) -> Result<()> {
    let session = Session::open(&args.input.document, args.input.cluster.as_deref())?;
    let change = Change {
        memory: args.memory,
        network: args.network,
        node_links: args.links,
        compute: args.compute,
        devices: args.devices,
    };
    let mut other = session.clone();
    other.request.cluster = changed(&session.request.cluster, change);
    if args.input.planner(&session)? == Planner::Ops {
        if format == Format::Json {
            return Err(Error::plain(
                Class::Unsupported,
                "`what-if --format json` is for plans that are mappings",
            ));
        }
        let model = session.model()?;
        let (own, with) = (session.plan(&model)?, other.plan(&model)?);
        out!(
            "now\n{}\nwith the change\n{}",
            plan_summary(&session.request, &own),
            plan_summary(&other.request, &with)
        );
        return Ok(());
    }
    let (own, with) = (session.search_mapping()?, other.search_mapping()?);
    let differences = differences(&own.mapping, &with.mapping);
    // Of a batch that is chosen anew, by the token.
    let speedup = with.estimate.tokens_per_s / own.estimate.tokens_per_s;
    match format {
        Format::Text => {
            outln!("now\n{}", summary(&own));
            outln!(
                "with the change ({})\n{}",
                other.request.cluster,
                summary(&with)
            );
            outln!(
                "a step takes {} instead of {} (predicted): {speedup:.2} × as fast, {} instead of {} tokens/s",
                seconds(with.estimate.step_s),
                seconds(own.estimate.step_s),
                grouped(with.estimate.tokens_per_s.round() as u64),
                grouped(own.estimate.tokens_per_s.round() as u64),
            );
            for item in &differences {
                outln!("  {}: {} → {}", item.choice, item.first, item.second);
            }
        }
        Format::Json => outln!(
            "{}",
            json!({
                "now": {"mapping": own.mapping, "predicted_s": own.estimate.step_s},
                "changed": {"mapping": with.mapping, "predicted_s": with.estimate.step_s},
                "speedup": speedup,
                "differences": differences,
            })
        ),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_read() {
        assert_eq!(factor("x2"), Ok(2.0));
        assert_eq!(factor("0.5"), Ok(0.5));
        assert_eq!(factor("+20%"), Ok(1.2));
        assert_eq!(factor("-50%"), Ok(0.5));
        assert!(factor("twice").is_err());
        assert!(factor("-100%").is_err());
    }
}
