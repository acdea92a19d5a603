//! The attention block: multi-head, grouped-query, or with latent keys and values.
//!
//! Legend: q `[batch, seq, heads, (group,) head]`, k `[batch, kv_seq, heads, head]`,
//! v `[batch, kv_seq, heads, value]`; `heads` are the key heads, `group` the queries that share one.

use meshweave_dsl::build::GraphBuilder;
use meshweave_dsl::dtype::Scalar;
use meshweave_dsl::graph::{Init, TensorId};
use meshweave_dsl::op::{AttentionDims, OpKind};

use super::coherent::Stand;
use super::golden::{Part, Stream};
use super::{Built, Mla, Model, ModelError};

/// q, k and v, k and v still along `seq`.
type Qkv = (TensorId, TensorId, TensorId);

impl Model<'_> {
    /// h + attention(norm(h)), `[batch, seq, embed]`.
    pub(super) fn attention(
        &self,
        b: &mut GraphBuilder,
        layer_idx: usize,
        h: TensorId,
        stand: &Stand,
    ) -> Built {
        let (config, attention) = (self.config, &self.config.attention);
        let x = self.norm(b, "norm", "input", h)?;
        let (q, k, v) = match &attention.mla {
            None => self.heads(b, layer_idx, x, stand)?,
            Some(mla) => self.latent_heads(b, layer_idx, mla, x, stand)?,
        };
        let (k, v) = match stand.seats {
            None => (k, v),
            Some(seats) => (
                self.at_home(b, "k.home", k, seats)?,
                self.at_home(b, "v.home", v, seats)?,
            ),
        };
        let k = b.rename("keys", k, "seq", "kv_seq")?;
        let v = b.rename("values", v, "seq", "kv_seq")?;
        let dims = AttentionDims {
            seq: stand.dims.last().copied().unwrap_or("seq").into(),
            kv_seq: "kv_seq".into(),
            head: "head".into(),
            value: "value".into(),
            scale: Scalar(
                attention
                    .scale
                    .unwrap_or(1.0 / (attention.head as f64).sqrt()),
            ),
            causal: true,
            offset: 0,
        };
        let core = match stand.seats {
            None => b.attention("core", q, k, v, dims)?,
            Some(seats) => b.apply("core", OpKind::Attention(dims), &[q, k, v, seats.seen])?,
        };

        let value = b.size_of(core, "value")?;
        let mut shape = self.head_dims();
        shape.extend([("value", value), ("embed", config.embed)]);
        let init =
            Stream::layer(layer_idx, Part::Wo).residual(attention.heads * value, config.n_layers);
        let wo = b.param("wo", config.dtype, shape, init)?;
        let rows = stand.dims.iter().copied().chain(["embed"]);
        let out = b.contract("out", core, wo, rows)?;
        let out = self.biased(b, attention.bias.o, "bo", "out.biased", out, &["embed"])?;
        Ok(b.add("residual", h, out)?)
    }

    /// `heads`, and `group` where several queries share a key.
    fn head_dims(&self) -> Vec<(&'static str, usize)> {
        let attention = &self.config.attention;
        let group = attention.heads / attention.kv_heads;
        let mut dims = vec![("heads", attention.kv_heads)];
        dims.extend((group > 1).then_some(("group", group)));
        dims
    }

    fn heads(
        &self,
        b: &mut GraphBuilder,
        layer_idx: usize,
        x: TensorId,
        stand: &Stand,
    ) -> Result<Qkv, ModelError> {
        let attention = &self.config.attention;
        let key_heads = [("heads", attention.kv_heads)];
        let mut project =
            |part, name: &str, heads: &[(&'static str, usize)], width: &'static str, bias| {
                let mut dims = heads.to_vec();
                dims.push((width, attention.head));
                let y = self.projection(b, layer_idx, part, name, x, "embed", &dims, stand)?;
                let names: Vec<&str> = dims.iter().map(|(dim, _)| *dim).collect();
                self.biased(
                    b,
                    bias,
                    &format!("b{name}"),
                    &format!("{name}.biased"),
                    y,
                    &names,
                )
            };
        let q = project(Part::Wq, "q", &self.head_dims(), "head", attention.bias.q)?;
        let k = project(Part::Wk, "k", &key_heads, "head", attention.bias.k)?;
        let v = project(Part::Wv, "v", &key_heads, "value", attention.bias.v)?;
        let q = self.placed(b, "q", q, stand)?;
        let k = self.placed(b, "k", k, stand)?;
        Ok((q, k, v))
    }

    /// The heads of q or k, normalized and rotated where the model does so.
    fn placed(&self, b: &mut GraphBuilder, name: &str, x: TensorId, stand: &Stand) -> Built {
        let config = self.config;
        let mut x = x;
        if config.attention.qk_norm {
            let shape = [("head", config.attention.head)];
            let weight = b.param(&format!("{name}_norm"), config.dtype, shape, Init::Ones)?;
            x = b.rms_norm(
                &format!("{name}.normed"),
                x,
                weight,
                "head",
                config.norm.eps,
            )?;
        }
        if let Some(tables) = stand.rope {
            x = b.rope(&format!("{name}.rotated"), x, tables, "head")?;
        }
        Ok(x)
    }

    /// Latent attention (DeepSeek-V2, arXiv 2405.04434, equations 9 to 19).
    ///
    /// The projections of the parts with and without positions are weights of their own.
    fn latent_heads(
        &self,
        b: &mut GraphBuilder,
        layer_idx: usize,
        mla: &Mla,
        x: TensorId,
        stand: &Stand,
    ) -> Result<Qkv, ModelError> {
        let (heads, tables) = (self.config.attention.heads, stand.rope);
        let per_head = |width: &'static str, size| [("heads", heads), (width, size)];

        let (q_input, q_dim) = match mla.q_rank {
            None => (x, "embed"),
            Some(rank) => {
                let latent = [("q_latent", rank)];
                let c =
                    self.projection(b, layer_idx, Part::WqA, "q_a", x, "embed", &latent, stand)?;
                (self.latent_norm(b, "q_a", c, latent, mla.eps)?, "q_latent")
            }
        };
        let dims = per_head("head", mla.nope);
        let q_nope = self.projection(
            b,
            layer_idx,
            Part::WqNope,
            "q_nope",
            q_input,
            q_dim,
            &dims,
            stand,
        )?;
        let dims = per_head("head", mla.rope);
        let q_rope = self.projection(
            b,
            layer_idx,
            Part::WqRope,
            "q_rope",
            q_input,
            q_dim,
            &dims,
            stand,
        )?;

        let latent = [("kv_latent", mla.kv_rank)];
        let c = self.projection(b, layer_idx, Part::WkvA, "kv_a", x, "embed", &latent, stand)?;
        let c = self.latent_norm(b, "kv_a", c, latent, mla.eps)?;
        let dims = per_head("head", mla.nope);
        let k_nope = self.projection(
            b,
            layer_idx,
            Part::WkNope,
            "k_nope",
            c,
            "kv_latent",
            &dims,
            stand,
        )?;
        let dims = per_head("value", mla.value);
        let v = self.projection(b, layer_idx, Part::WvB, "v", c, "kv_latent", &dims, stand)?;
        let dims = [("head", mla.rope)];
        let k_rope = self.projection(
            b,
            layer_idx,
            Part::WkRope,
            "k_rope",
            x,
            "embed",
            &dims,
            stand,
        )?;

        let (q_rope, k_rope) = match tables {
            None => (q_rope, k_rope),
            Some(tables) => (
                b.rope("q_rope.rotated", q_rope, tables, "head")?,
                b.rope("k_rope.rotated", k_rope, tables, "head")?,
            ),
        };
        let shape = b.ty(q_rope).shape.clone();
        let k_rope = b.expand("k_rope.shared", k_rope, shape)?;
        let q = b.concat("q", &[q_nope, q_rope], "head")?;
        let k = b.concat("k", &[k_nope, k_rope], "head")?;
        Ok((q, k, v))
    }

    fn latent_norm(
        &self,
        b: &mut GraphBuilder,
        name: &str,
        x: TensorId,
        shape: [(&'static str, usize); 1],
        eps: f64,
    ) -> Built {
        let [(dim, _)] = shape;
        let weight = b.param(
            &format!("{name}_norm"),
            self.config.dtype,
            shape,
            Init::Ones,
        )?;
        Ok(b.rms_norm(&format!("{name}.normed"), x, weight, dim, eps)?)
    }

    /// `x · w{name}[from, dims..]`: `[batch, seq, dims..]` or rows, called `name`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn projection(
        &self,
        b: &mut GraphBuilder,
        layer_idx: usize,
        part: Part,
        name: &str,
        x: TensorId,
        from: &'static str,
        dims: &[(&'static str, usize)],
        stand: &Stand,
    ) -> Built {
        let fan_in = b.size_of(x, from)?;
        let mut shape = vec![(from, fan_in)];
        shape.extend(dims);
        let init = Stream::layer(layer_idx, part).init(fan_in);
        let weight = b.param(&format!("w{name}"), self.config.dtype, shape, init)?;
        let width = dims.iter().map(|(dim, _)| *dim);
        let out = stand.dims.iter().copied().chain(width);
        Ok(b.contract(name, x, weight, out)?)
    }
}
