//! Text to graphs.
//!
//! Lines are read into statements first, then names are resolved, so that a state may stand before
//! its parameter. A line that is not understood is reported and skipped; the results of an op that is
//! not understood stay known with the types that the line gives them, so that one error is one
//! message.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::Parsed;
use super::value::is_name_char;
use crate::diagnostics::{Diagnostic, SourceId, Span, did_you_mean};
use crate::dtype::DType;
use crate::graph::{Graph, Op, Role, Tensor, TensorId, TensorType};
use crate::name::Dim;
use crate::op::{BinaryFn, OpKind, UnaryFn};

/// Something not understood, and where.
pub(super) type Fault = Box<Diagnostic>;

/// A place in one line of the text.
#[derive(Clone, Copy)]
pub(super) struct Cursor<'a> {
    source: SourceId,
    text: &'a str,
    at: usize,
    end: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    pub(super) fn bump(&mut self) {
        self.at += self.peek().map_or(0, char::len_utf8);
    }

    pub(super) fn skip_spaces(&mut self) {
        self.take_while(|c| c.is_whitespace());
    }

    /// Takes `c` if it comes next, after spaces.
    pub(super) fn eat(&mut self, c: char) -> bool {
        let mut ahead = *self;
        ahead.skip_spaces();
        let found = ahead.peek() == Some(c);
        if found {
            ahead.bump();
            *self = ahead;
        }
        found
    }

    pub(super) fn expect(&mut self, c: char) -> Result<(), Fault> {
        if self.eat(c) {
            return Ok(());
        }
        self.skip_spaces();
        Err(self.expected(&format!("`{c}`")))
    }

    pub(super) fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let len = rest.find(|c| !wanted(c)).unwrap_or(rest.len());
        self.at += len;
        &rest[..len]
    }

    /// A word, possibly in quotes.
    pub(super) fn word(&mut self, what: &str) -> Result<String, Fault> {
        self.text_of(what, |c| is_name_char(c) && c != '[' && c != ']')
    }

    /// The name of a tensor, possibly in quotes.
    fn name(&mut self) -> Result<String, Fault> {
        self.text_of("the name of a tensor", is_name_char)
    }

    fn text_of(&mut self, what: &str, wanted: fn(char) -> bool) -> Result<String, Fault> {
        self.skip_spaces();
        let start = self.at;
        if self.peek() != Some('"') {
            let text = self.take_while(wanted);
            return if text.is_empty() {
                Err(self.expected(what))
            } else {
                Ok(text.into())
            };
        }
        let mut stream = serde_json::Deserializer::from_str(self.rest()).into_iter::<String>();
        match stream.next() {
            Some(Ok(text)) => {
                self.at += stream.byte_offset();
                Ok(text)
            }
            _ => {
                self.at = self.end;
                Err(self.fault(start, "the quoted text does not end on its line".into()))
            }
        }
    }

    /// A diagnostic from `start` to here.
    pub(super) fn fault(&self, start: usize, message: String) -> Fault {
        Box::new(Diagnostic::invalid(message).at(self.span(start), ""))
    }

    fn expected(&self, what: &str) -> Fault {
        let mut ahead = *self;
        if ahead.take_while(is_name_char).is_empty() {
            ahead.bump();
        }
        let found = match &self.text[self.at..ahead.at] {
            "" => "the end of the line".into(),
            text => format!("`{text}`"),
        };
        let span = ahead.span(self.at);
        Box::new(Diagnostic::invalid(format!("expected {what}, found {found}")).at(span, ""))
    }

    fn span(&self, start: usize) -> Span {
        Span::new(self.source, start, self.at)
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..self.end]
    }

    fn is_done(&mut self) -> bool {
        self.skip_spaces();
        self.at >= self.end
    }
}

/// A name and where it stands.
struct Named {
    name: String,
    span: Span,
}

/// What a line says.
enum Statement {
    Source {
        name: Named,
        ty: TensorType,
        role: SourceRole,
    },
    Op {
        results: Vec<(Named, TensorType)>,
        /// `None` when the op was not understood (and reported).
        kind: Option<OpKind>,
        inputs: Vec<Named>,
        span: Span,
    },
    Output(Named),
    Update(Named, Named),
    Gradient(Named, Named),
    Ids(Vec<u32>, Span),
}

enum SourceRole {
    Known(Role),
    StateOf(Named),
}

pub(super) fn parse(text: &str, source: SourceId) -> Parsed {
    let mut diagnostics = Vec::new();
    let mut graph = Graph::default();
    let mut statements = Vec::new();
    let mut state = Place::Before;
    for line in lines(text, source) {
        let mut cursor = line;
        if cursor.is_done() {
            continue;
        }
        let start = cursor.at;
        match state {
            Place::Before => match header(&mut cursor) {
                Ok(name) => {
                    graph.name = name;
                    state = Place::Inside;
                }
                Err(fault) => {
                    diagnostics.push(fault.help("a graph begins with `graph \"name\" {`"));
                    // Without a header the lines may still be statements.
                    state = Place::Inside;
                }
            },
            Place::Inside if cursor.eat('}') => {
                state = Place::After;
                if !cursor.is_done() {
                    diagnostics.push(*cursor.expected("the end of the line after `}`"));
                }
            }
            Place::Inside => {
                let outcome = statement(&mut cursor, &mut diagnostics);
                match outcome {
                    Ok(statement) => {
                        if !cursor.is_done() {
                            diagnostics.push(*cursor.expected("the end of the line"));
                        }
                        statements.push(statement);
                    }
                    Err(fault) => diagnostics.push(*fault),
                }
            }
            Place::After => {
                let span = Span::new(source, start, line.end);
                let message = "there is text after the graph's closing `}`";
                diagnostics.push(Diagnostic::invalid(message).at(span, ""));
                break;
            }
        }
    }
    let end = Span::new(source, text.len(), text.len());
    match state {
        Place::Before => diagnostics.push(
            Diagnostic::invalid("the text holds no graph")
                .at(end, "")
                .help("a graph begins with `graph \"name\" {`"),
        ),
        Place::Inside => diagnostics.push(
            Diagnostic::invalid(format!("graph `{}` does not end", graph.name))
                .at(end, "")
                .help("close it with `}` on a line of its own"),
        ),
        Place::After => {}
    }
    Resolver::new(graph, diagnostics).resolve(statements)
}

#[derive(Clone, Copy)]
enum Place {
    Before,
    Inside,
    After,
}

/// The lines of the text without their comments.
fn lines(text: &str, source: SourceId) -> impl Iterator<Item = Cursor<'_>> {
    let mut start = 0;
    text.split_inclusive('\n').map(move |line| {
        let at = start;
        start += line.len();
        let content = line.trim_end_matches(['\n', '\r']);
        Cursor {
            source,
            text,
            at,
            end: at + comment_start(content),
        }
    })
}

/// Where the comment of a line begins: the first `#` outside quotes, or its end.
fn comment_start(line: &str) -> usize {
    let mut is_quoted = false;
    let mut is_escaped = false;
    for (at, c) in line.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' if is_quoted => is_escaped = true,
            '"' => is_quoted = !is_quoted,
            '#' if !is_quoted => return at,
            _ => {}
        }
    }
    line.len()
}

fn header(cursor: &mut Cursor<'_>) -> Result<String, Fault> {
    let start = cursor.at;
    if cursor.take_while(is_name_char) != "graph" {
        cursor.at = start;
        return Err(cursor.expected("`graph`"));
    }
    let name = cursor.word("the graph's name")?;
    cursor.expect('{')?;
    if cursor.is_done() {
        Ok(name)
    } else {
        Err(cursor.expected("the end of the line after `{`"))
    }
}

fn statement(
    cursor: &mut Cursor<'_>,
    diagnostics: &mut Vec<Diagnostic>,
) -> Result<Statement, Fault> {
    let start = *cursor;
    let keyword = cursor.take_while(is_name_char);
    // A tensor may be called `input`: what follows tells.
    if matches!(cursor.peek(), Some(':' | ',')) || keyword.is_empty() {
        *cursor = start;
        return op_statement(cursor, diagnostics);
    }
    match keyword {
        "input" | "param" | "const" | "state" => source_statement(keyword, cursor),
        "output" => Ok(Statement::Output(named(cursor)?)),
        "update" => pair(cursor).map(|(source, update)| Statement::Update(source, update)),
        "gradient" => pair(cursor).map(|(param, gradient)| Statement::Gradient(param, gradient)),
        "ids" => ids(cursor),
        other => {
            let known = [
                "input", "param", "const", "state", "output", "update", "gradient", "ids",
            ];
            let message = format!("`{other}` begins no statement of a graph");
            Err(Box::new(
                Diagnostic::invalid(message)
                    .at(cursor.span(start.at), "")
                    .maybe_help(did_you_mean(other, known))
                    .help("an op is written `name: type = op{attributes}(inputs)`"),
            ))
        }
    }
}

fn source_statement(keyword: &str, cursor: &mut Cursor<'_>) -> Result<Statement, Fault> {
    let name = named(cursor)?;
    cursor.expect(':')?;
    let ty = tensor_type(cursor)?;
    let role = match keyword {
        "param" => {
            cursor.expect('=')?;
            SourceRole::Known(Role::Param(tagged(cursor, "initial value")?))
        }
        "const" => {
            cursor.expect('=')?;
            SourceRole::Known(Role::Const(tagged(cursor, "constant")?))
        }
        "state" => {
            cursor.skip_spaces();
            let start = *cursor;
            if cursor.take_while(is_name_char) != "of" {
                return Err(start.expected("`of` and the parameter that the state belongs to"));
            }
            SourceRole::StateOf(named(cursor)?)
        }
        _ => SourceRole::Known(Role::Input),
    };
    Ok(Statement::Source { name, ty, role })
}

fn op_statement(
    cursor: &mut Cursor<'_>,
    diagnostics: &mut Vec<Diagnostic>,
) -> Result<Statement, Fault> {
    let mut results = Vec::new();
    loop {
        let name = named(cursor)?;
        cursor.expect(':')?;
        results.push((name, tensor_type(cursor)?));
        if !cursor.eat(',') {
            break;
        }
    }
    let outcome = application(cursor, diagnostics);
    let (kind, inputs, span) = match outcome {
        Ok(application) => application,
        Err(fault) => {
            diagnostics.push(*fault);
            let span = cursor.span(cursor.at);
            cursor.at = cursor.end;
            (None, Vec::new(), span)
        }
    };
    Ok(Statement::Op {
        results,
        kind,
        inputs,
        span,
    })
}

/// `= op{attributes}(inputs)`.
fn application(
    cursor: &mut Cursor<'_>,
    diagnostics: &mut Vec<Diagnostic>,
) -> Result<(Option<OpKind>, Vec<Named>, Span), Fault> {
    cursor.expect('=')?;
    cursor.skip_spaces();
    let start = cursor.at;
    let op_name = cursor.word("an op")?;
    let name_span = cursor.span(start);
    let content = cursor.tagged_content()?;
    let kind = match op_kind(&op_name, content) {
        Ok(kind) => Some(kind),
        Err(diagnostic) => {
            let span = if diagnostic.code.is_some() {
                name_span
            } else {
                cursor.span(start)
            };
            diagnostics.push(
                Diagnostic {
                    code: None,
                    ..*diagnostic
                }
                .at(span, ""),
            );
            None
        }
    };
    cursor.expect('(')?;
    let mut inputs = Vec::new();
    while !cursor.eat(')') {
        inputs.push(named(cursor)?);
        cursor.skip_spaces();
        if cursor.peek() != Some(')') {
            cursor.expect(',')?;
        }
    }
    Ok((kind, inputs, cursor.span(start)))
}

/// The op of this name and attributes. Diagnostics about the name alone bear a code.
fn op_kind(name: &str, content: Option<Value>) -> Result<OpKind, Fault> {
    let mut content = content.unwrap_or(Value::Null);
    let tag = |tag: &str, content: &Value| {
        Value::Object(Map::from_iter([(tag.to_string(), content.clone())]))
    };
    let function = match &content {
        Value::Null => Value::String(name.into()),
        content => tag(name, content),
    };
    let mut offers = variants::<OpKind>();
    offers.retain(|tag| tag != "unary" && tag != "binary");
    offers.extend(variants::<UnaryFn>());
    offers.extend(variants::<BinaryFn>());
    if !offers.iter().any(|known| known == name) {
        return Err(Box::new(
            Diagnostic::invalid(format!("there is no op `{name}`"))
                .code("name")
                .maybe_help(did_you_mean(name, offers.iter().map(String::as_str))),
        ));
    }
    if variants::<UnaryFn>().iter().any(|known| known == name) {
        return function_of(name, &function).map(OpKind::Unary);
    }
    if variants::<BinaryFn>().iter().any(|known| known == name) {
        return function_of(name, &function).map(OpKind::Binary);
    }
    if content.is_null() {
        content = Value::Object(Map::new());
    }
    typed(&tag(name, &content), &format!("op `{name}`"))
}

/// A function of elements: a tag, or a tag and its constant.
fn function_of<T: DeserializeOwned>(name: &str, value: &Value) -> Result<T, Fault> {
    serde_json::from_value(value.clone()).map_err(|error| {
        let bare = serde_json::from_value::<T>(Value::String(name.into()));
        let message = match (value, bare) {
            (Value::String(_), _) => {
                format!("op `{name}` takes a number in braces, such as `{name}{{0.5}}`")
            }
            (_, Ok(_)) => format!("op `{name}` has no attributes"),
            (_, Err(_)) => format!("op `{name}`: {error}"),
        };
        Box::new(Diagnostic::invalid(message))
    })
}

/// A value of a closed set of tags with attributes, such as an initial value.
fn tagged<T: DeserializeOwned + serde::Serialize>(
    cursor: &mut Cursor<'_>,
    what: &str,
) -> Result<T, Fault> {
    cursor.skip_spaces();
    let start = cursor.at;
    let name = cursor.word(&format!("a {what}"))?;
    let value = match cursor.tagged_content()? {
        None => Value::String(name.clone()),
        Some(content) => Value::Object(Map::from_iter([(name.clone(), content)])),
    };
    let offers = variants::<T>();
    if !offers.contains(&name) {
        return Err(Box::new(
            Diagnostic::invalid(format!("there is no {what} `{name}`"))
                .at(cursor.span(start), "")
                .maybe_help(did_you_mean(&name, offers.iter().map(String::as_str)))
                .help(format!("known are {}", offers.join(", "))),
        ));
    }
    typed(&value, &format!("{what} `{name}`"))
        .map_err(|diagnostic| Box::new(diagnostic.at(cursor.span(start), "")))
}

/// Deserializes, refusing attributes that the type does not have.
fn typed<T: DeserializeOwned + serde::Serialize>(value: &Value, what: &str) -> Result<T, Fault> {
    let typed: T = serde_json::from_value(value.clone())
        .map_err(|error| Box::new(Diagnostic::invalid(format!("{what}: {error}"))))?;
    let back = serde_json::to_value(&typed).unwrap_or(Value::Null);
    if let Some(key) = unknown_key(value, &back) {
        return Err(Box::new(Diagnostic::invalid(format!(
            "{what} has no attribute `{key}`"
        ))));
    }
    Ok(typed)
}

/// A key of `written` that is not in `known`.
fn unknown_key(written: &Value, known: &Value) -> Option<String> {
    match (written, known) {
        (Value::Object(written), Value::Object(known)) => {
            written
                .iter()
                .find_map(|(key, value)| match known.get(key) {
                    Some(known) => unknown_key(value, known),
                    None => Some(key.clone()),
                })
        }
        (Value::Array(written), Value::Array(known)) => written
            .iter()
            .zip(known)
            .find_map(|(written, known)| unknown_key(written, known)),
        _ => None,
    }
}

/// The tags of an enum, as serde lists them when it is given another.
fn variants<T: DeserializeOwned>() -> Vec<String> {
    let error = serde_json::from_value::<T>(Value::String("?".into())).err();
    let message = error.map(|error| error.to_string()).unwrap_or_default();
    let listed = message.split_once("expected").map_or("", |(_, list)| list);
    listed
        .split('`')
        .skip(1)
        .step_by(2)
        .map(String::from)
        .collect()
}

fn named(cursor: &mut Cursor<'_>) -> Result<Named, Fault> {
    cursor.skip_spaces();
    let start = cursor.at;
    let name = cursor.name()?;
    Ok(Named {
        name,
        span: cursor.span(start),
    })
}

fn pair(cursor: &mut Cursor<'_>) -> Result<(Named, Named), Fault> {
    let first = named(cursor)?;
    cursor.expect('-')?;
    cursor.expect('>')?;
    Ok((first, named(cursor)?))
}

fn tensor_type(cursor: &mut Cursor<'_>) -> Result<TensorType, Fault> {
    cursor.skip_spaces();
    let start = cursor.at;
    let dtype = cursor.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
    let dtype = [DType::F32, DType::Bf16, DType::F16, DType::I32]
        .into_iter()
        .find(|known| known.name() == dtype)
        .ok_or_else(|| {
            let message = format!("`{dtype}` is no element type");
            Box::new(
                Diagnostic::invalid(message)
                    .at(cursor.span(start), "")
                    .help("element types are f32, bf16, f16 and i32"),
            )
        })?;
    cursor.expect('[')?;
    let mut shape: Vec<(Dim, usize)> = Vec::new();
    while !cursor.eat(']') {
        cursor.skip_spaces();
        let dim_start = cursor.at;
        let dim = Dim::from(cursor.word("a dim")?);
        if shape.iter().any(|(known, _)| *known == dim) {
            return Err(cursor.fault(dim_start, format!("dim `{dim}` stands twice")));
        }
        cursor.expect(':')?;
        cursor.skip_spaces();
        let size_start = cursor.at;
        let size = cursor.take_while(|c| c.is_ascii_alphanumeric() || c == '-');
        let size = size.parse().map_err(|_| {
            cursor.fault(
                size_start,
                format!("dim `{dim}` has the size `{size}`, which is no number of elements"),
            )
        })?;
        shape.push((dim, size));
        cursor.skip_spaces();
        if cursor.peek() != Some(']') {
            cursor.expect(',')?;
        }
    }
    let elements = shape
        .iter()
        .try_fold(1_usize, |n, (_, size)| n.checked_mul(*size));
    if elements
        .and_then(|n| n.checked_mul(dtype.n_bytes()))
        .is_none()
    {
        return Err(cursor.fault(start, "the tensor is larger than any memory".into()));
    }
    Ok(TensorType { dtype, shape })
}

fn ids(cursor: &mut Cursor<'_>) -> Result<Statement, Fault> {
    let start = cursor.at;
    let mut ids: Vec<u32> = Vec::new();
    while !cursor.is_done() {
        let at = cursor.at;
        let run = cursor.take_while(|c| !c.is_whitespace());
        let (first, last) = run.split_once('-').unwrap_or((run, run));
        match (first.parse::<u32>(), last.parse::<u32>()) {
            (Ok(first), Ok(last))
                if first <= last && (last - first) as usize <= cursor.text.len() =>
            {
                ids.extend(first..=last);
            }
            _ => return Err(cursor.fault(at, format!("`{run}` is no id and no run of ids"))),
        }
    }
    Ok(Statement::Ids(ids, cursor.span(start)))
}

/// Builds the graph from statements, in their order.
struct Resolver {
    graph: Graph,
    diagnostics: Vec<Diagnostic>,
    known: BTreeMap<String, (TensorId, Span)>,
    /// Results whose op has been read.
    made: Vec<bool>,
}

impl Resolver {
    fn new(graph: Graph, diagnostics: Vec<Diagnostic>) -> Self {
        Self {
            graph,
            diagnostics,
            known: BTreeMap::new(),
            made: Vec::new(),
        }
    }

    fn resolve(mut self, statements: Vec<Statement>) -> Parsed {
        for statement in &statements {
            match statement {
                Statement::Source { name, ty, role } => {
                    let role = match role {
                        SourceRole::Known(role) => role.clone(),
                        // Resolved below, when all names are known.
                        SourceRole::StateOf(_) => Role::State { of: TensorId(0) },
                    };
                    self.declare(name, ty, role);
                }
                Statement::Op { results, .. } => {
                    for (name, ty) in results {
                        self.declare(name, ty, Role::Temp);
                    }
                }
                _ => {}
            }
        }
        self.made = self
            .graph
            .tensors
            .iter()
            .map(|tensor| tensor.role != Role::Temp)
            .collect();
        let mut order = None;
        for statement in statements {
            match statement {
                Statement::Source { name, role, .. } => {
                    if let SourceRole::StateOf(owner) = role
                        && let (Some(state), Some(of)) = (self.find(&name), self.find(&owner))
                    {
                        self.graph.tensors[state.index()].role = Role::State { of };
                    }
                }
                Statement::Op {
                    results,
                    kind,
                    inputs,
                    span,
                } => self.op(results, kind, inputs, span),
                Statement::Output(name) => {
                    let id = self.find(&name);
                    self.graph.outputs.extend(id);
                }
                Statement::Update(source, update) => {
                    if let (Some(source), Some(update)) = (self.find(&source), self.find(&update)) {
                        self.graph.updates.insert(source, update);
                    }
                }
                Statement::Gradient(param, gradient) => {
                    if let (Some(param), Some(gradient)) = (self.find(&param), self.find(&gradient))
                    {
                        self.graph.gradients.insert(param, gradient);
                    }
                }
                Statement::Ids(ids, span) => order = Some((ids, span)),
            }
        }
        if let Some((ids, span)) = order {
            self.renumber(&ids, span);
        }
        Parsed {
            graph: self.graph,
            diagnostics: self.diagnostics,
        }
    }

    fn declare(&mut self, name: &Named, ty: &TensorType, role: Role) {
        if let Some((_, first)) = self.known.get(&name.name) {
            let message = format!("`{}` is named twice", name.name);
            self.diagnostics.push(
                Diagnostic::invalid(message)
                    .at(name.span, "")
                    .also(*first, "first here"),
            );
            return;
        }
        let id = TensorId(self.graph.tensors.len() as u32);
        self.graph.tensors.push(Tensor {
            name: name.name.clone(),
            ty: ty.clone(),
            role,
        });
        self.known.insert(name.name.clone(), (id, name.span));
    }

    fn find(&mut self, name: &Named) -> Option<TensorId> {
        if let Some((id, _)) = self.known.get(&name.name) {
            return Some(*id);
        }
        let known = self.known.keys().map(String::as_str);
        let help = did_you_mean(&name.name, known);
        let message = format!("there is no tensor `{}`", name.name);
        self.diagnostics.push(
            Diagnostic::invalid(message)
                .at(name.span, "")
                .maybe_help(help),
        );
        None
    }

    fn op(
        &mut self,
        results: Vec<(Named, TensorType)>,
        kind: Option<OpKind>,
        inputs: Vec<Named>,
        span: Span,
    ) {
        let input_ids: Vec<Option<TensorId>> = inputs.iter().map(|name| self.find(name)).collect();
        for (id, name) in input_ids.iter().zip(&inputs) {
            if let Some(id) = id
                && !self.made[id.index()]
            {
                let at = self.known.get(&name.name).map(|(_, span)| *span);
                let message = format!("`{}` is read before it is made", name.name);
                let mut diagnostic = Diagnostic::invalid(message).at(name.span, "");
                if let Some(at) = at {
                    diagnostic = diagnostic.also(at, "made here");
                }
                self.diagnostics.push(diagnostic);
            }
        }
        let result_ids: Vec<TensorId> = results
            .iter()
            .filter_map(|(name, _)| {
                // A name that stood before belongs to that place.
                let (id, span) = self.known.get(&name.name)?;
                (*span == name.span).then_some(*id)
            })
            .collect();
        for id in &result_ids {
            self.made[id.index()] = true;
        }
        let Some(inputs) = input_ids.into_iter().collect::<Option<Vec<TensorId>>>() else {
            return;
        };
        let (Some(kind), true) = (kind, result_ids.len() == results.len()) else {
            return;
        };
        if kind.group().is_none() {
            self.check_types(&kind, &inputs, &results, span);
        }
        self.graph.ops.push(Op {
            kind,
            inputs,
            results: result_ids,
        });
    }

    fn check_types(
        &mut self,
        kind: &OpKind,
        inputs: &[TensorId],
        results: &[(Named, TensorType)],
        span: Span,
    ) {
        let input_types: Vec<&TensorType> = inputs.iter().map(|id| self.graph.ty(*id)).collect();
        let diagnostic = match kind.infer(&input_types) {
            Err(error) => Some(Diagnostic::invalid(error.to_string()).at(span, "")),
            Ok(types) if types.len() != results.len() => Some(
                Diagnostic::invalid(format!(
                    "op `{}` has {} results, {} are named",
                    kind.name(),
                    types.len(),
                    results.len()
                ))
                .at(span, ""),
            ),
            Ok(types) => types
                .iter()
                .zip(results)
                .find_map(|(expected, (name, ty))| {
                    (expected != ty).then(|| {
                        Diagnostic::invalid(format!(
                            "`{}` is {ty}, op `{}` gives {expected}",
                            name.name,
                            kind.name()
                        ))
                        .at(name.span, "")
                        .also(span, "")
                    })
                }),
        };
        self.diagnostics.extend(diagnostic);
    }

    /// Gives the k-th tensor of the text the k-th id.
    fn renumber(&mut self, ids: &[u32], span: Span) {
        let n_tensors = self.graph.tensors.len();
        let mut places: Vec<Option<usize>> = vec![None; n_tensors];
        for (place, id) in ids.iter().enumerate() {
            if let Some(slot) = places.get_mut(*id as usize) {
                *slot = Some(place);
            }
        }
        let places: Option<Vec<usize>> = places.into_iter().collect();
        let (Some(places), true) = (places, ids.len() == n_tensors) else {
            let message = format!(
                "`ids` names {} ids; the graph has {n_tensors} tensors, each needs one of its own",
                ids.len()
            );
            self.diagnostics
                .push(Diagnostic::invalid(message).at(span, ""));
            return;
        };
        let renamed = |id: &TensorId| TensorId(ids[id.index()]);
        let graph = &mut self.graph;
        graph.tensors = places
            .iter()
            .map(|place| {
                let mut tensor = graph.tensors[*place].clone();
                if let Role::State { of } = &mut tensor.role {
                    *of = renamed(of);
                }
                tensor
            })
            .collect();
        for op in &mut graph.ops {
            for id in op.inputs.iter_mut().chain(&mut op.results) {
                *id = renamed(id);
            }
        }
        for id in &mut graph.outputs {
            *id = renamed(id);
        }
        for map in [&mut graph.updates, &mut graph.gradients] {
            *map = map.iter().map(|(a, b)| (renamed(a), renamed(b))).collect();
        }
    }
}
