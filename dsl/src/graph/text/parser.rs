//! Text to graphs.
//!
//! Lines are read into statements first, then names are resolved, so that a state may stand before
//! its parameter. A line that is not understood is reported and skipped; the results of an op that is
//! not understood stay known with the types that the line gives them, so that one error is one
//! message.

mod kind;
mod resolver;

use kind::{op_kind, tagged};
use resolver::Resolver;

use super::Parsed;
use super::value::is_name_char;
use crate::diagnostics::{Diagnostic, SourceId, Span, did_you_mean};
use crate::dtype::DType;
use crate::graph::{Graph, Role, TensorType};
use crate::name::Dim;
use crate::op::OpKind;

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
