//! Rotary positions: `rope_theta` with `rope_scaling` (transformers 4), or `rope_parameters` (5).
//!
//! Source: `transformers`, `modeling_rope_utils.py`.

use meshweave_dsl::graph::{RopeScaling, RopeTable};

use super::ImportError;
use super::fields::Fields;

/// The rotary table and the factor that YaRN as DeepSeek uses it puts on the attention's scale.
pub(super) struct Rope {
    pub table: RopeTable,
    /// mscale² for `mscale_all_dim`, else 1.
    pub scale: f64,
}

/// Reads the rotary fields of a config whose heads rotate `rotary_dim` elements.
pub(super) fn rope(
    fields: &mut Fields,
    rotary_dim: usize,
    default_theta: f64,
    max_positions: Option<usize>,
) -> Result<Rope, ImportError> {
    fields.must_equal("partial_rotary_factor", 1.0)?;
    let (key, top_theta) = if fields.has("rope_parameters") {
        fields.skip(&["rope_scaling"]);
        ("rope_parameters", fields.opt_f64("rope_theta")?)
    } else {
        fields.skip(&["rope_parameters"]);
        ("rope_scaling", fields.opt_f64("rope_theta")?)
    };
    let mut rope = Rope {
        table: RopeTable {
            theta: top_theta.unwrap_or(default_theta),
            rotary_dim,
            scaling: RopeScaling::None,
        },
        scale: 1.0,
    };
    let Some(mut inner) = fields.object(key)? else {
        return Ok(rope);
    };
    if let Some(theta) = inner.opt_f64("rope_theta")? {
        rope.table.theta = theta;
    }
    inner.must_equal("partial_rotary_factor", 1.0)?;
    let new = inner.opt_text("rope_type")?;
    let old = inner.opt_text("type")?;
    let kind = new.or(old).unwrap_or_else(|| "default".into());
    rope.table.scaling = match kind.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear {
            factor: inner.f64("factor")?,
        },
        "llama3" => RopeScaling::Llama3 {
            factor: inner.f64("factor")?,
            low_freq_factor: inner.f64("low_freq_factor")?,
            high_freq_factor: inner.f64("high_freq_factor")?,
            original_positions: inner.usize("original_max_position_embeddings")?,
        },
        "yarn" => yarn(&mut inner, max_positions, &mut rope.scale)?,
        other => {
            return Err(inner.unsupported(
                "rope_type",
                &format!("\"{other}\""),
                "known: default, linear, llama3, yarn",
            ));
        }
    };
    let factor = match rope.table.scaling {
        RopeScaling::None => 1.0,
        RopeScaling::Linear { factor }
        | RopeScaling::Llama3 { factor, .. }
        | RopeScaling::Yarn { factor, .. } => factor,
    };
    if !(factor > 0.0 && rope.table.theta > 0.0) {
        return Err(inner.invalid(
            "factor",
            &format!(
                "is {factor} and `rope_theta` {}, but both must be positive",
                rope.table.theta
            ),
        ));
    }
    inner.check_all_read(&[], &format!("of \"{kind}\" positions"))?;
    Ok(rope)
}

fn yarn(
    inner: &mut Fields,
    max_positions: Option<usize>,
    scale: &mut f64,
) -> Result<RopeScaling, ImportError> {
    let original_positions = inner.usize("original_max_position_embeddings")?;
    let factor = match (inner.opt_f64("factor")?, max_positions) {
        (Some(factor), _) => factor,
        (None, Some(max)) => max as f64 / original_positions as f64,
        (None, None) => inner.f64("factor")?,
    };
    if !inner.bool_or("truncate", true)? {
        return Err(inner.unsupported("truncate", "false", "only true"));
    }
    let mscale = inner.f64_or("mscale", 0.0)?;
    let mscale_all_dim = inner.f64_or("mscale_all_dim", 0.0)?;
    let amplitude = |mscale: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * mscale * factor.ln() + 1.0
        }
    };
    let default_factor = if mscale != 0.0 && mscale_all_dim != 0.0 {
        amplitude(mscale) / amplitude(mscale_all_dim)
    } else {
        amplitude(1.0)
    };
    if mscale_all_dim != 0.0 {
        *scale = amplitude(mscale_all_dim).powi(2);
    }
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: inner.f64_or("beta_fast", 32.0)?,
        beta_slow: inner.f64_or("beta_slow", 1.0)?,
        original_positions,
        attention_factor: inner.f64_or("attention_factor", default_factor)?,
    })
}
