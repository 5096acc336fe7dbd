//! What is wrong with a project, and where: all of it at once, with the source shown.

use std::fmt;

use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, NamedSource, SourceSpan};

use crate::span::{Place, Sources, Span};

/// More than this many errors help nobody: a file of 10,000 wrong lines ends here.
pub const MAX_DIAGNOSTICS: usize = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    Note,
    Warning,
    Error,
}

/// The kind of a problem; a program may branch on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Not YAML, or YAML that compose doesn't allow.
    Syntax,
    /// A bound on size, depth or number was reached.
    Limit,
    /// A key or value of the wrong form.
    Schema,
    /// `${…}` that can't be read, or a required variable.
    Interpolation,
    /// A file that can't be read.
    File,
    /// A name that nothing defines.
    Reference,
    /// depends_on, extends or include in a circle.
    Cycle,
    /// Two keys that contradict each other.
    Conflict,
    /// Valid compose that kiln doesn't honour here.
    Unsupported,
    /// Worth knowing; nothing is wrong.
    Advice,
    /// The options, not the file.
    Usage,
}

impl Code {
    pub fn as_str(self) -> &'static str {
        match self {
            Code::Syntax => "compose::syntax",
            Code::Limit => "compose::limit",
            Code::Schema => "compose::schema",
            Code::Interpolation => "compose::interpolation",
            Code::File => "compose::file",
            Code::Reference => "compose::reference",
            Code::Cycle => "compose::cycle",
            Code::Conflict => "compose::conflict",
            Code::Unsupported => "compose::unsupported",
            Code::Advice => "compose::advice",
            Code::Usage => "compose::usage",
        }
    }
}

/// One problem or note.
#[derive(Clone, Debug, PartialEq)]
pub struct Diagnostic {
    pub severity: Severity,
    pub code: Code,
    pub message: String,
    /// [`Span::NONE`]: no place in a file.
    pub span: Span,
    /// Said at the place itself.
    pub label: Option<&'static str>,
    pub hint: Option<String>,
    /// Other places that matter, and why.
    pub related: Vec<(Span, String)>,
    /// The schema's key pattern (`services.*.gpus`), for what one may choose to ignore.
    pub key: Option<Box<str>>,
}

impl Diagnostic {
    pub fn new(
        severity: Severity,
        code: Code,
        span: Span,
        message: impl Into<String>,
    ) -> Diagnostic {
        Diagnostic {
            severity,
            code,
            message: message.into(),
            span,
            label: None,
            hint: None,
            related: Vec::new(),
            key: None,
        }
    }

    pub fn error(code: Code, span: Span, message: impl Into<String>) -> Diagnostic {
        Self::new(Severity::Error, code, span, message)
    }

    pub fn warning(span: Span, message: impl Into<String>) -> Diagnostic {
        Self::new(Severity::Warning, Code::Advice, span, message)
    }

    pub fn note(span: Span, message: impl Into<String>) -> Diagnostic {
        Self::new(Severity::Note, Code::Advice, span, message)
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn maybe_hint(mut self, hint: Option<String>) -> Self {
        self.hint = hint.or(self.hint);
        self
    }

    #[must_use]
    pub fn label(mut self, label: &'static str) -> Self {
        self.label = Some(label);
        self
    }

    #[must_use]
    pub fn also(mut self, span: Span, why: impl Into<String>) -> Self {
        if !span.is_none() {
            self.related.push((span, why.into()));
        }
        self
    }

    #[must_use]
    pub fn key(mut self, key: impl Into<Box<str>>) -> Self {
        self.key = Some(key.into());
        self
    }
}

/// Collects; keeps the first [`MAX_DIAGNOSTICS`] errors and as many of the others.
#[derive(Clone, Debug, Default)]
pub struct Diagnostics {
    list: Vec<Diagnostic>,
    errors: usize,
    others: usize,
}

impl Diagnostics {
    pub fn push(&mut self, diagnostic: Diagnostic) {
        // extends and aliases show the same source text several times.
        if self.list.contains(&diagnostic) {
            return;
        }
        let count = match diagnostic.severity {
            Severity::Error => &mut self.errors,
            Severity::Note | Severity::Warning => &mut self.others,
        };
        *count += 1;
        if *count <= MAX_DIAGNOSTICS {
            self.list.push(diagnostic);
        }
    }

    pub fn error(&mut self, code: Code, span: Span, message: impl Into<String>) {
        self.push(Diagnostic::error(code, span, message));
    }

    /// As `push`, but not where an error is reported already: one mistake is told once.
    pub fn push_new(&mut self, diagnostic: Diagnostic) {
        let told = diagnostic.severity == Severity::Error && self.error_touches(diagnostic.span);
        if !told {
            self.push(diagnostic);
        }
    }

    /// Is an error reported inside of `span`, or around it?
    pub fn error_touches(&self, span: Span) -> bool {
        let inside = |a: Span, b: Span| a.file == b.file && a.start >= b.start && a.end <= b.end;
        !span.is_none()
            && self
                .list
                .iter()
                .filter(|d| d.severity == Severity::Error && !d.span.is_none())
                .any(|d| inside(d.span, span) || inside(span, d.span))
    }

    /// An error after which the rest of the project is guesswork: what was not read at all.
    pub fn hopeless(&self) -> bool {
        self.list.iter().any(|d| {
            d.severity == Severity::Error
                && matches!(
                    d.code,
                    Code::Syntax | Code::Limit | Code::File | Code::Cycle | Code::Unsupported
                )
        })
    }

    pub fn has_errors(&self) -> bool {
        self.errors > 0
    }

    pub fn errors(&self) -> usize {
        self.errors
    }

    pub fn full(&self) -> bool {
        self.errors >= MAX_DIAGNOSTICS
    }

    pub fn into_list(self) -> Vec<Diagnostic> {
        self.list
    }

    pub fn iter(&self) -> impl Iterator<Item = &Diagnostic> {
        self.list.iter()
    }
}

/// How diagnostics look.
#[derive(Clone, Copy, Debug)]
pub struct RenderOptions {
    pub color: bool,
    /// Columns of the terminal.
    pub width: usize,
}

impl Default for RenderOptions {
    fn default() -> Self {
        Self {
            color: false,
            width: 100,
        }
    }
}

/// Renders one diagnostic with the source text it is about.
pub fn render(diagnostic: &Diagnostic, sources: &Sources, options: RenderOptions) -> String {
    let theme = if options.color {
        GraphicalTheme::unicode()
    } else {
        GraphicalTheme::unicode_nocolor()
    };
    let handler = GraphicalReportHandler::new_themed(theme).with_width(options.width.max(40));
    let mut text = String::new();
    let report = Report::new(diagnostic, sources);
    if handler.render_report(&mut text, &report).is_err() {
        return one_line(diagnostic, sources);
    }
    text
}

/// `file:line:column: error: message`, for machines and narrow places.
pub fn one_line(diagnostic: &Diagnostic, sources: &Sources) -> String {
    let word = match diagnostic.severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Note => "note",
    };
    let hint = diagnostic
        .hint
        .as_ref()
        .map(|hint| format!(" ({hint})"))
        .unwrap_or_default();
    match sources.place(diagnostic.span) {
        Some(Place { path, line, column }) => format!(
            "{}:{line}:{column}: {word}: {}{hint}",
            path.display(),
            diagnostic.message
        ),
        None => format!("{word}: {}{hint}", diagnostic.message),
    }
}

/// One diagnostic as miette shows it: labels of one file, the rest as text below.
#[derive(Debug)]
struct Report {
    message: String,
    code: &'static str,
    severity: miette::Severity,
    help: Option<String>,
    source: Option<NamedSource<String>>,
    labels: Vec<LabeledSpan>,
}

impl Report {
    fn new(diagnostic: &Diagnostic, sources: &Sources) -> Report {
        let mut help: Vec<String> = diagnostic.hint.iter().cloned().collect();
        let mut labels = vec![];
        if !diagnostic.span.is_none() {
            labels.push(LabeledSpan::new_primary_with_span(
                diagnostic.label.map(str::to_owned),
                source_span(diagnostic.span),
            ));
        }
        for (span, why) in &diagnostic.related {
            if span.file == diagnostic.span.file {
                labels.push(LabeledSpan::new_with_span(
                    Some(why.clone()),
                    source_span(*span),
                ));
            } else if let Some(place) = sources.place(*span) {
                help.push(format!("{why}: {}", show(&place)));
            }
        }
        help.extend(origin(diagnostic.span, sources));
        Report {
            message: diagnostic.message.clone(),
            code: diagnostic.code.as_str(),
            severity: match diagnostic.severity {
                Severity::Error => miette::Severity::Error,
                Severity::Warning => miette::Severity::Warning,
                Severity::Note => miette::Severity::Advice,
            },
            help: (!help.is_empty()).then(|| help.join("\n")),
            source: sources.get(diagnostic.span.file).map(|source| {
                NamedSource::new(source.path.display().to_string(), source.text.to_string())
            }),
            labels,
        }
    }
}

/// The chain of `include` and `extends` that brought the file in.
fn origin(span: Span, sources: &Sources) -> Vec<String> {
    let mut lines = vec![];
    let mut at = span;
    while let Some((via, from)) = sources.get(at.file).and_then(|source| source.from) {
        if let Some(place) = sources.place(from) {
            lines.push(format!("{} from {}", via.verb(), show(&place)));
        }
        at = from;
    }
    lines
}

fn show(place: &Place) -> String {
    format!("{}:{}:{}", place.path.display(), place.line, place.column)
}

fn source_span(span: Span) -> SourceSpan {
    let start = span.start as usize;
    (start, (span.end as usize).saturating_sub(start)).into()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Report {}

impl miette::Diagnostic for Report {
    fn code<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        Some(Box::new(self.code))
    }

    fn severity(&self) -> Option<miette::Severity> {
        Some(self.severity)
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help
            .as_ref()
            .map(|text| Box::new(text) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn miette::SourceCode> {
        self.source
            .as_ref()
            .map(|source| source as &dyn miette::SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        Some(Box::new(self.labels.iter().cloned()))
    }
}

/// The known word nearest to `word`, near enough to be meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = match word.chars().count() {
        0..=2 => 1,
        3..=5 => 2,
        _ => 3,
    };
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit && *distance < word.len().max(2))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// "did you mean" as a hint.
pub fn did_you_mean<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest(word, known).map(|candidate| format!("did you mean `{candidate}`?"))
}
