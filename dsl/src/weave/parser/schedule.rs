//! Schedules: order keys with their expressions, rows of actions.

use super::block::BlockKind;
use super::{Empty, Parse, Parser, Stop};
use crate::diagnostics::{Diagnostic, did_you_mean};
use crate::weave::ast::{
    Action, ActionKind, BinaryOp, Cell, Expr, ExtremumOp, OrderKey, Row, ScheduleBody, ScheduleDef,
    Var,
};
use crate::weave::lexer::Tok;

const ROWS: BlockKind = BlockKind {
    name: "rows",
    keywords: &["row"],
};

impl<'a> Parser<'a> {
    /// `NAME = key … | rows { … } | csv "file"`
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
            ScheduleBody::Rows(self.block(ROWS, Self::row)?)
        } else if self.eat_word("csv") {
            ScheduleBody::Csv(self.spanned(|p| p.text_value("the file in quotes"))?)
        } else {
            return Err(self.unexpected_word("a schedule", &["key", "rows", "csv"]));
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

    fn cell(&mut self) -> Parse<Cell> {
        if self.eat(".") {
            return Ok(Cell::Wait);
        }
        let first = self.action()?;
        if self.eat("+") {
            return Ok(Cell::Pair(first, self.action()?));
        }
        Ok(Cell::One(first))
    }

    fn action(&mut self) -> Parse<Action> {
        let Some(action) = Action::parse(self.here()) else {
            let diagnostic = self.unexpected_diagnostic("an action").help(
                "`2F0` is stage 2, forward, microbatch 0; kinds are F, B, I, W, R; `.` waits; \
                 `2F3+5B1` overlaps two",
            );
            return Err(self.report(diagnostic));
        };
        self.advance();
        Ok(action)
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
