//! Functions between the types of `meshweave-dsl`.
