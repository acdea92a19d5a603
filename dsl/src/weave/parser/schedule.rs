//! Schedules: order keys with their expressions, rows of actions, queues of devices.

use super::block::BlockKind;
use super::{Empty, Parse, Parser, Stop};
use crate::diagnostics::{Diagnostic, did_you_mean};
use crate::schedule::{Channels, Command, Event, Item, StreamKind};
use crate::weave::ast::{
    ActionKind, BinaryOp, Cell, Expr, ExtremumOp, OrderKey, Row, ScheduleBody, ScheduleDef,
    StreamLine, Var,
};
use crate::weave::lexer::Tok;

const ROWS: BlockKind = BlockKind {
    name: "rows",
    keywords: &["row"],
};

const STREAMS: BlockKind = BlockKind {
    name: "streams",
    keywords: &["rank"],
};

impl<'a> Parser<'a> {
    /// `NAME = key … | rows { … } | streams { … } | csv "file"`
    pub(in crate::weave) fn schedule(&mut self) -> Parse<ScheduleDef> {
        let name = self.spanned(|p| p.name_as("the name of the schedule"))?;
        if !self.is_sign("=") {
            let diagnostic = self.unexpected_diagnostic("`=`").help(
                "a schedule is chosen within `pipeline AXIS { schedule NAME }`, \
                 and defined by `schedule NAME = …`",
            );
            return Err(self.report(diagnostic));
        }
        self.advance();
        let body = if self.eat_word("key") {
            let mut keys = vec![self.spanned(Self::order_key)?];
            while !self.at_end_of_statement() {
                keys.push(self.spanned(Self::order_key)?);
            }
            for (nth, key) in keys.iter().enumerate() {
                let first = keys.iter().take(nth).find(|k| k.action == key.action);
                if let Some(first) = first {
                    let message = format!("action `{}` has two keys", key.action.text());
                    let diagnostic = Diagnostic::invalid(message).code("W006");
                    self.diagnostics.push(
                        diagnostic
                            .at(key.span, "again here")
                            .also(first.span, "first here"),
                    );
                }
            }
            ScheduleBody::Key(keys)
        } else if self.eat_word("rows") {
            let channels = self.channels()?;
            let rows = self.block(ROWS, Self::row)?;
            ScheduleBody::Rows { channels, rows }
        } else if self.eat_word("streams") {
            let channels = self.channels()?;
            let streams = self.block(STREAMS, Self::stream)?;
            ScheduleBody::Streams { channels, streams }
        } else if self.eat_word("csv") {
            ScheduleBody::Csv(self.spanned(|p| p.text_value("the file in quotes"))?)
        } else {
            return Err(self.unexpected_word("a schedule", &["key", "rows", "streams", "csv"]));
        };
        Ok(ScheduleDef { name, body })
    }

    /// `F:(mb,0)`
    fn order_key(&mut self) -> Parse<OrderKey> {
        let action = self.one_of("an action", &ActionKind::ALL, ActionKind::text)?;
        self.expect(":")?;
        let key = self.parenthesized(Empty::Refused, Self::expr)?;
        Ok(OrderKey { action, key })
    }

    /// `row 0F0 0F1 . 0B0`
    fn row(&mut self) -> Parse<Row> {
        if !self.eat_word("row") {
            return Err(self.unknown_line(ROWS));
        }
        let mut cells = Vec::new();
        while !self.at_end_of_statement() {
            cells.push(self.cell()?);
        }
        Ok(Row { cells })
    }

    /// `channels blocking`, `pair`, `direction`, or the depth of buffers.
    fn channels(&mut self) -> Parse<Option<Channels>> {
        if !self.eat_word("channels") {
            return Ok(None);
        }
        let Some(channels) = Channels::parse(self.here()) else {
            let words = "`blocking`, `pair`, `direction`, or the depth of buffers from 1";
            return Err(self.unexpected(words));
        };
        self.advance();
        Ok(Some(channels))
    }

    fn cell(&mut self) -> Parse<Cell> {
        if self.eat(".") {
            return Ok(Cell::Wait);
        }
        let start = self.span();
        let mut commands = vec![self.command()?];
        while self.eat("+") {
            commands.push(self.command()?);
        }
        let span = start.to(self.last_span());
        Cell::joined(&commands).ok_or_else(|| {
            let message = "`+` joins two compute actions, with communication and memory actions \
                           between them";
            self.fail("W002", message, span)
        })
    }

    fn command(&mut self) -> Parse<Command> {
        let Some(command) = Command::parse(self.here()) else {
            let diagnostic = self.unexpected_diagnostic("an action").help(
                "`2F0` is stage 2, forward, microbatch 0; kinds are F, B, I, W, R; `.` waits; \
                 `2F3+5B1` overlaps two; `2SEND_F0`, `2RECV_B0`, `2OFFLOAD0` and `2PREFETCH0` are of \
                 a microbatch, `2UNSHARD`, `2RESHARD`, `2REDUCE_GRAD`, `2BARRIER` and `2UPDATE` of a \
                 stage",
            );
            return Err(self.report(diagnostic));
        };
        self.advance();
        Ok(command)
    }

    /// `rank 0 compute 0:0F0 4:0B0[3]`
    fn stream(&mut self) -> Parse<StreamLine> {
        if !self.eat_word("rank") {
            return Err(self.unknown_line(STREAMS));
        }
        let rank = self.count("a rank")? as usize;
        let kind = self.stream_kind()?;
        let (mut items, mut pairs) = (Vec::new(), Vec::new());
        while !self.at_end_of_statement() {
            items.push(self.item()?);
            if self.eat("+") {
                pairs.push(items.len() - 1);
                items.push(self.item()?);
            }
        }
        Ok(StreamLine {
            rank,
            kind,
            items,
            pairs,
        })
    }

    fn stream_kind(&mut self) -> Parse<StreamKind> {
        Ok(if self.eat_word("compute") {
            StreamKind::Compute
        } else if self.eat_word("messages") {
            StreamKind::Exchange { with: None }
        } else if self.eat_word("collective") {
            StreamKind::Collective
        } else if self.eat_word("with") {
            let with = Some(self.count("a rank")? as usize);
            StreamKind::Exchange { with }
        } else if self.eat_word("to") {
            if self.eat_word("host") {
                StreamKind::ToHost
            } else {
                let to = self.count("a rank, or `host`")? as usize;
                StreamKind::Send { to }
            }
        } else if self.eat_word("from") {
            if self.eat_word("host") {
                StreamKind::FromHost
            } else {
                let from = self.count("a rank, or `host`")? as usize;
                StreamKind::Recv { from }
            }
        } else {
            let words = ["compute", "to", "from", "with", "messages", "collective"];
            return Err(self.unexpected_word("a queue", &words));
        })
    }

    /// `4:0B0[1,3]`
    fn item(&mut self) -> Parse<Item> {
        let event = Event(self.count("the number of an event")? as usize);
        self.expect(":")?;
        let command = self.command()?;
        let mut waits = Vec::new();
        if self.is_sign("[") {
            let opened = self.expect("[")?;
            waits = self.comma_list(|p| Ok(Event(p.count("the number of an event")? as usize)))?;
            self.close("]", opened)?;
        }
        Ok(Item {
            command,
            event,
            waits,
        })
    }

    /// Sums of products.
    pub(in crate::weave) fn expr(&mut self) -> Parse<Expr> {
        self.sum(0)
    }

    fn sum(&mut self, depth: usize) -> Parse<Expr> {
        let begin = self.span();
        let mut left = self.product(depth)?;
        let mut n_terms = depth;
        loop {
            let op = match self.peek() {
                Tok::Sign("+") => BinaryOp::Add,
                Tok::Sign("-") => BinaryOp::Sub,
                _ => return Ok(left),
            };
            n_terms += 1;
            if n_terms > Expr::MAX_DEPTH {
                return Err(self.too_deep(begin));
            }
            self.advance();
            left = binary(op, left, self.product(depth + 1)?);
        }
    }

    fn product(&mut self, depth: usize) -> Parse<Expr> {
        let begin = self.span();
        let mut left = self.unary(depth)?;
        let mut n_factors = depth;
        loop {
            let op = match self.peek() {
                Tok::Sign("*") => BinaryOp::Mul,
                Tok::Sign("/") => BinaryOp::Div,
                Tok::Sign("%") => BinaryOp::Rem,
                _ => return Ok(left),
            };
            n_factors += 1;
            if n_factors > Expr::MAX_DEPTH {
                return Err(self.too_deep(begin));
            }
            self.advance();
            left = binary(op, left, self.unary(depth + 1)?);
        }
    }

    fn unary(&mut self, depth: usize) -> Parse<Expr> {
        let span = self.span();
        if depth > Expr::MAX_DEPTH {
            return Err(self.too_deep(span));
        }
        if self.eat("-") {
            return Ok(Expr::Neg(Box::new(self.unary(depth + 1)?)));
        }
        if self.eat("(") {
            let inner = self.sum(depth + 1)?;
            self.expect(")")?;
            return Ok(inner);
        }
        if *self.peek() == Tok::Number {
            let value = self.count("a whole number")?;
            return match u32::try_from(value) {
                Ok(value) => Ok(Expr::Int(value)),
                Err(_) => Err(self.fail("W005", format!("the number {value} is too large"), span)),
            };
        }
        for op in [ExtremumOp::Min, ExtremumOp::Max] {
            if self.eat_word(op.text()) {
                let args = self.parenthesized(Empty::Refused, |p| p.sum(depth + 1))?;
                return Ok(Expr::Extremum { op, args });
            }
        }
        let var = Var::ALL.into_iter().find(|var| self.is_word(var.text()));
        match var {
            Some(var) => {
                self.advance();
                Ok(Expr::Var(var))
            }
            None => Err(self.no_operand()),
        }
    }

    fn no_operand(&mut self) -> Stop {
        if *self.peek() != Tok::Word {
            return self.unexpected("a number, a variable, `min(…)`, `max(…)` or `(`");
        }
        let names = Var::ALL.map(Var::text);
        let list: Vec<String> = Var::ALL
            .iter()
            .map(|var| format!("`{}` ({})", var.text(), var.meaning()))
            .collect();
        let near = did_you_mean(self.here(), names);
        let message = format!("an order key has no variable `{}`", self.here());
        let span = self.span();
        let diagnostic = Diagnostic::invalid(message).code("W003").at(span, "");
        self.report(
            diagnostic
                .maybe_help(near)
                .help(format!("its variables are {}", list.join(", "))),
        )
    }

    fn too_deep(&mut self, span: crate::diagnostics::Span) -> Stop {
        let message = format!(
            "this order key is more than {} operations deep; simplify it",
            Expr::MAX_DEPTH
        );
        self.fail("W005", message, span)
    }
}

fn binary(op: BinaryOp, left: Expr, right: Expr) -> Expr {
    Expr::Binary {
        op,
        left: Box::new(left),
        right: Box::new(right),
    }
}
