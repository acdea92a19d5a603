//! Routing traces as Parquet files.
//!
//! Enters: tokens one by one, or a file. Leaves: a file, or traces of a bounded number of tokens.
//! Invariant: what is written reads back equal; neither side holds more than one row group.
//!
//! A row is a token in a layer, ordered by token and then by layer, every layer present:
//!
//! | column | type | |
//! |---|---|---|
//! | `token` | INT64 | counts from 0 in the order of recording |
//! | `layer` | INT32 | counts layers with experts from 0 |
//! | `expert_0` … `expert_{k−1}` | INT32 | the experts chosen, −1 where none |
//! | `weight_0` … `weight_{k−1}` | FLOAT | the router's weights; all of them or none |
//!
//! The key-value metadata `meshweave.trace` is the JSON of [`Header`]; a file without it is read
//! too, its sizes inferred from the rows. Columns are dictionary-encoded and not compressed, so an
//! expert of 256 takes a byte; Snappy, which most writers use, is read.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Repetition, Type as Physical};
use parquet::column::reader::ColumnReader;
use parquet::data_type::{FloatType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use serde::{Deserialize, Serialize};

use super::{MOST_EXPERTS, NO_EXPERT, RoutingTrace, TraceError, TraceShape};

/// Key of the metadata.
const KEY: &str = "meshweave.trace";
/// Version of the columns above.
const VERSION: u32 = 1;
/// Rows of a row group, about: what either side holds in memory.
const ROWS_PER_GROUP: usize = 1 << 18;

/// What the metadata of a file says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub version: u32,
    #[serde(flatten)]
    pub shape: TraceShape,
    pub model: Option<String>,
}

/// Writes a trace token by token.
pub struct TraceWriter<W: Write + Send> {
    file: SerializedFileWriter<W>,
    held: RoutingTrace,
    with_weights: bool,
    n_written: usize,
}

impl<W: Write + Send> TraceWriter<W> {
    /// Begins a file.
    ///
    /// # Errors
    /// The shape cannot occur, or nothing can be written.
    pub fn new(
        target: W,
        shape: TraceShape,
        model: Option<String>,
        with_weights: bool,
    ) -> Result<Self, TraceError> {
        let held = RoutingTrace::new(shape, model.clone())?;
        let header = Header {
            version: VERSION,
            shape,
            model,
        };
        let text = serde_json::to_string(&header)
            .map_err(|error| TraceError::Internal(format!("the header has no JSON: {error}")))?;
        let properties = WriterProperties::builder()
            .set_key_value_metadata(Some(vec![KeyValue::new(KEY.to_string(), text)]))
            .set_max_row_group_row_count(None)
            .build();
        let schema = schema(shape.top_k, with_weights).map_err(unwritten)?;
        let file = SerializedFileWriter::new(target, Arc::new(schema), Arc::new(properties));
        Ok(Self {
            file: file.map_err(unwritten)?,
            held,
            with_weights,
            n_written: 0,
        })
    }

    /// Adds a token, laid out as in [`RoutingTrace::push`].
    ///
    /// # Errors
    /// The token contradicts the trace, or nothing can be written.
    pub fn push(&mut self, choices: &[u16], weights: Option<&[f32]>) -> Result<(), TraceError> {
        if weights.is_some() != self.with_weights {
            let (this, file) = if self.with_weights {
                ("no weights", "has them")
            } else {
                ("weights", "has none")
            };
            return Err(TraceError::Invalid(format!(
                "token {} brings {this}, the file {file}",
                self.n_written + self.held.n_tokens()
            )));
        }
        self.held.push(choices, weights)?;
        if self.held.n_tokens() * self.held.shape.layers >= ROWS_PER_GROUP {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes what is held and closes the file; returns the number of tokens.
    ///
    /// # Errors
    /// Nothing can be written.
    pub fn finish(mut self) -> Result<usize, TraceError> {
        self.flush()?;
        self.file.close().map_err(unwritten)?;
        Ok(self.n_written)
    }

    fn flush(&mut self) -> Result<(), TraceError> {
        let n_tokens = self.held.n_tokens();
        if n_tokens == 0 {
            return Ok(());
        }
        self.write_group().map_err(unwritten)?;
        self.n_written += n_tokens;
        self.held = self.held.range(0, 0);
        self.held.weights = None;
        Ok(())
    }

    fn write_group(&mut self) -> Result<(), ParquetError> {
        let TraceShape { layers, top_k, .. } = self.held.shape;
        let n_tokens = self.held.n_tokens();
        let mut group = self.file.next_row_group()?;
        let mut column_idx = 0;
        while let Some(mut column) = group.next_column()? {
            match column_idx {
                0 => {
                    let tokens: Vec<i64> = (0..n_tokens * layers)
                        .map(|row| (self.n_written + row / layers) as i64)
                        .collect();
                    column
                        .typed::<Int64Type>()
                        .write_batch(&tokens, None, None)?;
                }
                1 => {
                    let rows = 0..n_tokens * layers;
                    let rows: Vec<i32> = rows.map(|row| (row % layers) as i32).collect();
                    column.typed::<Int32Type>().write_batch(&rows, None, None)?;
                }
                _ if column_idx < 2 + top_k => {
                    let slots = self.held.choices.iter().skip(column_idx - 2).step_by(top_k);
                    let experts: Vec<i32> = slots
                        .map(|expert| match *expert {
                            NO_EXPERT => -1,
                            expert => i32::from(expert),
                        })
                        .collect();
                    column
                        .typed::<Int32Type>()
                        .write_batch(&experts, None, None)?;
                }
                _ => {
                    let weights = self.held.weights.iter().flatten();
                    let slots = weights.skip(column_idx - 2 - top_k).step_by(top_k);
                    let weights: Vec<f32> = slots.copied().collect();
                    column
                        .typed::<FloatType>()
                        .write_batch(&weights, None, None)?;
                }
            }
            column.close()?;
            column_idx += 1;
        }
        group.close()?;
        Ok(())
    }
}

fn schema(top_k: usize, with_weights: bool) -> Result<Type, ParquetError> {
    let column = |name: String, physical: Physical| {
        Type::primitive_type_builder(&name, physical)
            .with_repetition(Repetition::REQUIRED)
            .build()
            .map(Arc::new)
    };
    let mut columns = vec![
        column("token".into(), Physical::INT64)?,
        column("layer".into(), Physical::INT32)?,
    ];
    for slot in 0..top_k {
        columns.push(column(format!("expert_{slot}"), Physical::INT32)?);
    }
    for slot in 0..if with_weights { top_k } else { 0 } {
        columns.push(column(format!("weight_{slot}"), Physical::FLOAT)?);
    }
    Type::group_type_builder("routes")
        .with_fields(columns)
        .build()
}

fn unwritten(error: ParquetError) -> TraceError {
    TraceError::Exhausted(format!("the trace cannot be written: {error}"))
}

fn unread(error: ParquetError) -> TraceError {
    TraceError::Invalid(format!("the trace cannot be read as Parquet: {error}"))
}

/// Writes a whole trace into a file.
///
/// # Errors
/// The file cannot be written.
pub fn write(trace: &RoutingTrace, target: impl Write + Send) -> Result<(), TraceError> {
    let with_weights = trace.weights.is_some();
    let mut writer = TraceWriter::new(target, trace.shape, trace.model.clone(), with_weights)?;
    for token in 0..trace.n_tokens() {
        writer.push(trace.token(token), trace.token_weights(token))?;
    }
    writer.finish()?;
    Ok(())
}

/// Reads a whole file.
///
/// # Errors
/// See [`TraceReader::open`] and [`TraceReader::next_part`].
pub fn read(path: &Path) -> Result<RoutingTrace, TraceError> {
    let mut reader = TraceReader::open(path)?;
    let mut trace = RoutingTrace::new(reader.shape(), reader.header.model.clone())?;
    while let Some(part) = reader.next_part()? {
        for token in 0..part.n_tokens() {
            trace.push(part.token(token), part.token_weights(token))?;
        }
    }
    Ok(trace)
}

/// Reads a file, one row group at a time.
pub struct TraceReader {
    file: SerializedFileReader<File>,
    header: Header,
    columns: Columns,
    next_group: usize,
    next_token: usize,
    /// Rows of a token that continues in the next row group.
    pending: Pending,
}

#[derive(Default)]
struct Pending {
    choices: Vec<u16>,
    weights: Vec<f32>,
}

/// Where the columns stand in the file.
struct Columns {
    token: usize,
    layer: usize,
    experts: Vec<usize>,
    weights: Vec<usize>,
}

impl TraceReader {
    /// Opens a file.
    ///
    /// # Errors
    /// The file cannot be read, is not Parquet, or lacks columns.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let file = File::open(path).map_err(|error| {
            TraceError::Invalid(format!("cannot open {}: {error}", path.display()))
        })?;
        let file = SerializedFileReader::new(file).map_err(unread)?;
        let metadata = file.metadata().file_metadata();
        let columns = Columns::find(metadata.schema_descr())?;
        let stated = metadata.key_value_metadata().into_iter().flatten();
        let stated = stated
            .filter(|pair| pair.key == KEY)
            .find_map(|pair| pair.value.as_deref());
        let header = match stated {
            Some(text) => serde_json::from_str(text).map_err(|error| {
                TraceError::Invalid(format!(
                    "the metadata `{KEY}` is not a trace header: {error}"
                ))
            })?,
            None => infer(&file, &columns)?,
        };
        if header.version > VERSION {
            return Err(TraceError::Unsupported(format!(
                "the trace has version {}, this program reads up to {VERSION}",
                header.version
            )));
        }
        header.shape.check()?;
        if header.shape.top_k != columns.experts.len() {
            return Err(TraceError::Invalid(format!(
                "the trace says top-{}, but has {} columns expert_0…",
                header.shape.top_k,
                columns.experts.len()
            )));
        }
        Ok(Self {
            file,
            header,
            columns,
            next_group: 0,
            next_token: 0,
            pending: Pending::default(),
        })
    }

    /// The sizes of the router.
    pub fn shape(&self) -> TraceShape {
        self.header.shape
    }

    /// What the file says about itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The tokens that end in the next row group; `None` at the end of the file.
    ///
    /// # Errors
    /// Rows out of order or missing, experts that do not exist, weights that are not numbers.
    pub fn next_part(&mut self) -> Result<Option<RoutingTrace>, TraceError> {
        if self.next_group == self.file.num_row_groups() {
            if self.pending.choices.is_empty() {
                return Ok(None);
            }
            return Err(TraceError::Invalid(format!(
                "token {} ends after layer {}, the trace has {} layers",
                self.next_token,
                self.pending.choices.len() / self.header.shape.top_k - 1,
                self.header.shape.layers
            )));
        }
        let group = self.next_group;
        self.next_group += 1;
        let rows = Rows::read(&self.file, group, &self.columns)?;
        let shape = self.header.shape;
        let mut part = RoutingTrace::new(shape, self.header.model.clone())?;
        for row in 0..rows.tokens.len() {
            let layer = self.pending.choices.len() / shape.top_k;
            let (token, found) = (rows.tokens[row], rows.layers[row]);
            if (token, found) != (self.next_token as i64, layer as i64) {
                return Err(TraceError::Invalid(format!(
                    "row group {group}, row {row} is token {token}, layer {found}; token {}, layer \
                     {layer} should follow: sort by token and layer, and leave none out",
                    self.next_token
                )));
            }
            for experts in &rows.experts {
                self.pending
                    .choices
                    .push(expert(experts[row], token, found)?);
            }
            for weights in &rows.weights {
                self.pending.weights.push(weights[row]);
            }
            if layer + 1 == shape.layers {
                let weights = (!rows.weights.is_empty()).then_some(&self.pending.weights[..]);
                part.push(&self.pending.choices, weights)?;
                self.pending.choices.clear();
                self.pending.weights.clear();
                self.next_token += 1;
            }
        }
        Ok(Some(part))
    }
}

fn expert(number: i64, token: i64, layer: i64) -> Result<u16, TraceError> {
    match number {
        -1 => Ok(NO_EXPERT),
        0..=65534 => Ok(number as u16),
        _ => Err(TraceError::Invalid(format!(
            "token {token} has expert {number} in layer {layer}; experts are 0 to {}, or −1 for none",
            MOST_EXPERTS - 1
        ))),
    }
}

impl Columns {
    fn find(schema: &parquet::schema::types::SchemaDescriptor) -> Result<Self, TraceError> {
        let find = |name: &str| {
            let mut columns = schema.columns().iter();
            columns.position(|column| column.path().string() == name)
        };
        let slots = |kind: &str| -> Vec<usize> {
            (0..)
                .map_while(|slot| find(&format!("{kind}_{slot}")))
                .collect()
        };
        let needed = |name: &str| {
            find(name).ok_or_else(|| {
                let columns = schema.columns().iter();
                let found: Vec<String> = columns.map(|column| column.path().string()).collect();
                TraceError::Invalid(format!(
                    "the file has no column `{name}`, only {}; a trace has token, layer, expert_0, …",
                    found.join(", ")
                ))
            })
        };
        let found = Self {
            token: needed("token")?,
            layer: needed("layer")?,
            experts: slots("expert"),
            weights: slots("weight"),
        };
        needed("expert_0")?;
        if !found.weights.is_empty() && found.weights.len() != found.experts.len() {
            return Err(TraceError::Invalid(format!(
                "the trace has {} expert columns and {} weight columns; give as many or none",
                found.experts.len(),
                found.weights.len()
            )));
        }
        Ok(found)
    }
}

/// The rows of one row group, column by column.
struct Rows {
    tokens: Vec<i64>,
    layers: Vec<i64>,
    experts: Vec<Vec<i64>>,
    weights: Vec<Vec<f32>>,
}

impl Rows {
    fn read(
        file: &SerializedFileReader<File>,
        group: usize,
        columns: &Columns,
    ) -> Result<Self, TraceError> {
        let experts = columns.experts.iter();
        let weights = columns.weights.iter();
        Ok(Self {
            tokens: integers(file, group, columns.token)?,
            layers: integers(file, group, columns.layer)?,
            experts: experts
                .map(|column| integers(file, group, *column))
                .collect::<Result<_, _>>()?,
            weights: weights
                .map(|column| floats(file, group, *column))
                .collect::<Result<_, _>>()?,
        })
    }
}

/// Reads a column, whole; `$missing` stands where the file has null.
macro_rules! read_column {
    ($reader:expr, $n_rows:expr, $missing:expr, $from:expr) => {{
        let mut values = Vec::with_capacity($n_rows);
        let mut levels: Vec<i16> = Vec::new();
        while $reader
            .read_records($n_rows, Some(&mut levels), None, &mut values)
            .map_err(unread)?
            .0
            > 0
        {}
        let mut values = values.into_iter().map($from);
        if levels.is_empty() {
            values.collect()
        } else {
            let rows = levels.iter();
            rows.map(|level| match level {
                0 => $missing,
                _ => values.next().unwrap_or($missing),
            })
            .collect()
        }
    }};
}

fn integers(
    file: &SerializedFileReader<File>,
    group: usize,
    column: usize,
) -> Result<Vec<i64>, TraceError> {
    let group = file.get_row_group(group).map_err(unread)?;
    let n_rows = usize::try_from(group.metadata().num_rows()).unwrap_or(0);
    match group.get_column_reader(column).map_err(unread)? {
        ColumnReader::Int32ColumnReader(mut reader) => {
            Ok(read_column!(reader, n_rows, -1, i64::from))
        }
        ColumnReader::Int64ColumnReader(mut reader) => {
            Ok(read_column!(reader, n_rows, -1, |value| value))
        }
        _ => Err(not_of_type(file, column, "integers")),
    }
}

fn floats(
    file: &SerializedFileReader<File>,
    group: usize,
    column: usize,
) -> Result<Vec<f32>, TraceError> {
    let group = file.get_row_group(group).map_err(unread)?;
    let n_rows = usize::try_from(group.metadata().num_rows()).unwrap_or(0);
    match group.get_column_reader(column).map_err(unread)? {
        ColumnReader::FloatColumnReader(mut reader) => {
            Ok(read_column!(reader, n_rows, 0.0, |value| value))
        }
        ColumnReader::DoubleColumnReader(mut reader) => {
            Ok(read_column!(reader, n_rows, 0.0, |value: f64| value as f32))
        }
        _ => Err(not_of_type(file, column, "floating-point numbers")),
    }
}

fn not_of_type(file: &SerializedFileReader<File>, column: usize, expected: &str) -> TraceError {
    let schema = file.metadata().file_metadata().schema_descr();
    let column = schema.column(column);
    TraceError::Invalid(format!(
        "column `{}` holds {}, {expected} are needed",
        column.path().string(),
        column.physical_type()
    ))
}

/// The sizes of a file that does not state them, from a pass over its rows.
fn infer(file: &SerializedFileReader<File>, columns: &Columns) -> Result<Header, TraceError> {
    let (mut layers, mut experts) = (0, 0);
    for group in 0..file.num_row_groups() {
        let rows = Rows::read(file, group, columns)?;
        layers = rows.layers.into_iter().fold(layers, i64::max);
        experts = rows.experts.into_iter().flatten().fold(experts, i64::max);
    }
    let size = |most: i64| usize::try_from(most + 1).unwrap_or(0);
    Ok(Header {
        version: VERSION,
        shape: TraceShape {
            layers: size(layers),
            experts: size(experts),
            top_k: columns.experts.len(),
        },
        model: None,
    })
}
