//! Blank lines between groups of statements, for documents that no person has spaced.

use super::ast::{Document, Statement, Trivia};

/// Statements that belong together, in the order of a typical file.
#[derive(PartialEq)]
enum Group {
    Header,
    Definition,
    Mesh,
    Tactic,
    Directive,
    Plan,
    Block,
}

fn group(statement: &Statement) -> Group {
    match statement {
        Statement::Plan(_)
        | Statement::Data(_)
        | Statement::Init(_)
        | Statement::Train(_)
        | Statement::Infer(_) => Group::Header,
        Statement::Model(_) | Statement::Cluster(_) => Group::Definition,
        Statement::Mesh(_) | Statement::Use(_) => Group::Mesh,
        Statement::Tactic(_) | Statement::Apply(_) => Group::Tactic,
        Statement::Pin(_) | Statement::Forbid(_) | Statement::Prefer(_) => Group::Directive,
        Statement::Place(_) | Statement::Keep(_) => Group::Plan,
        Statement::Schedule(_)
        | Statement::Pipeline(_)
        | Statement::Memory(_)
        | Statement::Experts(_)
        | Statement::Solve(_) => Group::Block,
    }
}

impl Document {
    /// The same with a blank line between statements of different groups (header, definitions,
    /// meshes, tactics, directives, blocks), where there is none yet.
    #[must_use]
    pub fn spaced(mut self) -> Document {
        let mut last: Option<Group> = None;
        for line in &mut self.body.lines {
            let group = group(&line.item);
            let changes = last.as_ref().is_some_and(|last| *last != group);
            if changes && !line.lead.contains(&Trivia::Blank) {
                line.lead.insert(0, Trivia::Blank);
            }
            last = Some(group);
        }
        self
    }
}
