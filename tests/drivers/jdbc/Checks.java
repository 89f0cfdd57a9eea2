// The JDBC driver as applications use it: each check on a direct connection and through the sidecar.

import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.InputStream;
import java.io.OutputStream;
import java.math.BigDecimal;
import java.nio.charset.StandardCharsets;
import java.sql.Array;
import java.sql.BatchUpdateException;
import java.sql.CallableStatement;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Savepoint;
import java.sql.Statement;
import java.sql.Types;
import java.time.LocalDate;
import java.time.LocalDateTime;
import java.time.OffsetDateTime;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.Set;
import java.util.UUID;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;
import org.postgresql.copy.CopyIn;
import org.postgresql.copy.CopyManager;
import org.postgresql.largeobject.LargeObject;
import org.postgresql.largeobject.LargeObjectManager;
import org.postgresql.util.PSQLException;
import org.postgresql.util.ServerErrorMessage;

public class Checks {
  record Address(String host, String port, String user, String password, String database, int backends) {
    Connection connect(String... options) throws SQLException {
      Properties properties = new Properties();
      properties.setProperty("user", user);
      properties.setProperty("password", password);
      properties.setProperty("loginTimeout", "10");
      properties.setProperty("socketTimeout", "20");
      for (int n = 0; n < options.length; n += 2) properties.setProperty(options[n], options[n + 1]);
      return DriverManager.getConnection("jdbc:postgresql://" + host + ":" + port + "/" + database, properties);
    }
  }

  interface Check { Object run(Address at) throws Exception; }

  interface Work { void run() throws Exception; }

  static Address direct;

  // -- what checks share ----------------------------------------------------------------------------

  static void execute(Connection conn, String... queries) throws SQLException {
    try (Statement statement = conn.createStatement()) {
      for (String query : queries) statement.execute(query);
    }
  }

  static List<List<String>> rows(ResultSet set) throws SQLException {
    List<List<String>> rows = new ArrayList<>();
    int columns = set.getMetaData().getColumnCount();
    while (set.next()) {
      List<String> row = new ArrayList<>();
      for (int n = 1; n <= columns; n++) row.add(set.getString(n));
      rows.add(row);
    }
    return rows;
  }

  static List<List<String>> query(Connection conn, String text) throws SQLException {
    try (Statement statement = conn.createStatement(); ResultSet set = statement.executeQuery(text)) {
      return rows(set);
    }
  }

  static String refused(Work work) throws Exception {
    try {
      work.run();
    } catch (PSQLException error) {
      ServerErrorMessage told = error.getServerErrorMessage();
      if (told == null) return error.getSQLState();
      return String.join("|", error.getSQLState(), told.getSeverity(), told.getMessage(), told.getDetail(),
          told.getHint(), "" + told.getPosition(), told.getConstraint());
    }
    throw new AssertionError("it was not refused");
  }

  static void must(boolean holds, Object what) {
    if (!holds) throw new AssertionError(String.valueOf(what));
  }

  // -- checks ---------------------------------------------------------------------------------------

  static Object login(Address at) throws Exception {
    List<Object> seen = new ArrayList<>();
    String[] names = {"application_name", "TimeZone", "DateStyle", "search_path", "extra_float_digits", "work_mem", "client_encoding"};
    for (String[] options : new String[][] {
      {}, {"ApplicationName", "a name"}, {"currentSchema", "pg_catalog"}, {"options", "-c work_mem=7MB"},
      {"readOnly", "true", "autosave", "always"}, {"preferQueryMode", "simple"}, {"assumeMinServerVersion", "9.0"},
    }) {
      try (Connection conn = at.connect(options)) {
        for (String name : names) seen.add(query(conn, "SHOW " + name));
        seen.add(query(conn, "SELECT current_user, current_database()"));
        seen.add(conn.getMetaData().getDatabaseProductVersion() + conn.isReadOnly() + conn.isValid(5));
      }
    }
    return seen;
  }

  // Ten times each: text first, then a named statement, then binary.
  static Object values(Address at) throws Exception {
    Map<String, Object> values = new LinkedHashMap<>();
    values.put("int4", -5);
    values.put("int8", Long.MIN_VALUE);
    values.put("float8", 1e300);
    values.put("numeric", new BigDecimal("12345678901234567890.0987654321"));
    values.put("bool", true);
    values.put("text", "Zürich 北京 🐘 ' \" \\ \n");
    values.put("varchar", "x".repeat(100_000));
    values.put("uuid", new UUID(7, 7));
    values.put("date", LocalDate.of(9999, 12, 31));
    values.put("timestamp", LocalDateTime.of(2024, 2, 29, 23, 59, 59, 999999000));
    values.put("timestamptz", OffsetDateTime.parse("2024-02-29T23:59:59.999999Z"));
    List<Object> seen = new ArrayList<>();
    try (Connection conn = at.connect()) {
      for (Map.Entry<String, Object> each : values.entrySet()) {
        try (PreparedStatement statement = conn.prepareStatement("SELECT ?::" + each.getKey() + ", ?::int")) {
          for (int n = 0; n < 10; n++) {
            statement.setObject(1, each.getValue());
            statement.setObject(2, n == 3 ? null : n, Types.INTEGER);
            try (ResultSet set = statement.executeQuery()) {
              must(set.next(), "a row");
              Object value = set.getObject(1, each.getValue().getClass());
              must(value.equals(each.getValue()), each.getKey() + " " + value);
              seen.add(value + " " + set.getString(2) + set.wasNull());
            }
          }
        }
      }
      byte[] bytes = new byte[50_000];
      for (int n = 0; n < bytes.length; n++) bytes[n] = (byte) n;
      try (PreparedStatement statement = conn.prepareStatement("SELECT ?::bytea, ?::int[], ?::jsonb")) {
        for (int n = 0; n < 10; n++) {
          statement.setBytes(1, bytes);
          Array array = conn.createArrayOf("int4", new Object[] {1, null, n});
          statement.setArray(2, array);
          statement.setObject(3, "{\"a\": [1, null]}", Types.OTHER);
          try (ResultSet set = statement.executeQuery()) {
            must(set.next() && Arrays.equals(bytes, set.getBytes(1)), "bytes");
            seen.add(Arrays.toString((Object[]) set.getArray(2).getArray()) + set.getString(3));
          }
        }
      }
    }
    return seen;
  }

  // One PreparedStatement, from the 5th time S_1 on the server, in one transaction after the other.
  static Set<Integer> backends(Address at, int turns) throws Exception {
    try (Connection conn = at.connect();
        PreparedStatement one = conn.prepareStatement("SELECT pg_backend_pid(), ?::int + 1");
        PreparedStatement two = conn.prepareStatement("SELECT ?::text")) {
      Set<Integer> pids = new HashSet<>();
      for (int n = 0; n < turns && (n < 50 || pids.size() < at.backends); n++) {
        one.setInt(1, n);
        try (ResultSet set = one.executeQuery()) {
          must(set.next() && set.getInt(2) == n + 1, n);
          pids.add(set.getInt(1));
        }
        two.setString(1, "ü" + n);
        try (ResultSet set = two.executeQuery()) {
          must(set.next() && set.getString(1).equals("ü" + n), n);
        }
      }
      return pids;
    }
  }

  static Object prepared(Address at) throws Exception {
    return backends(at, 50).size() > 0;
  }

  static Object wanders(Address at) throws Exception {
    int seen = backends(at, 500).size();
    return at.backends == 1 ? seen == 1 : seen >= at.backends;
  }

  // More texts than it keeps: it closes statements.
  static Object many(Address at) throws Exception {
    try (Connection conn = at.connect("prepareThreshold", "1", "preparedStatementCacheQueries", "10")) {
      for (int turn = 0; turn < 3; turn++) {
        for (int n = 0; n < 30; n++) {
          try (PreparedStatement statement = conn.prepareStatement("SELECT ?::int + " + n)) {
            statement.setInt(1, turn);
            try (ResultSet set = statement.executeQuery()) {
              must(set.next() && set.getInt(1) == turn + n, n);
            }
          }
        }
      }
      execute(conn, "DEALLOCATE ALL", "DISCARD ALL");
      return query(conn, "SELECT 'goes on'");
    }
  }

  static Object transactions(Address at) throws Exception {
    List<Object> seen = new ArrayList<>();
    try (Connection conn = at.connect()) {
      execute(conn, "DROP TABLE IF EXISTS tx", "CREATE TABLE tx (id int CONSTRAINT one PRIMARY KEY, note text)");
      conn.setTransactionIsolation(Connection.TRANSACTION_SERIALIZABLE);
      conn.setAutoCommit(false);
      try (PreparedStatement insert = conn.prepareStatement("INSERT INTO tx VALUES (?, ?)")) {
        for (int n = 1; n <= 12; n++) {
          insert.setInt(1, n);
          insert.setString(2, "kept");
          insert.executeUpdate();
        }
        Savepoint point = conn.setSavepoint("a point");
        insert.setInt(1, 100);
        insert.executeUpdate();
        insert.setInt(1, 1);
        seen.add(refused(insert::executeUpdate));
        seen.add(refused(() -> query(conn, "SELECT 1")));
        conn.rollback(point);
        conn.commit();
        insert.setInt(1, 200);
        insert.executeUpdate();
        conn.rollback();
      }
      seen.add(query(conn, "SHOW transaction_isolation"));
      seen.add(query(conn, "SELECT count(*), max(id) FROM tx"));
      conn.commit();
      conn.setReadOnly(true);
      seen.add(refused(() -> execute(conn, "INSERT INTO tx VALUES (300)")));
      conn.rollback();
    }
    try (Connection conn = at.connect("autosave", "always")) {
      conn.setAutoCommit(false);
      execute(conn, "INSERT INTO tx VALUES (400)");
      seen.add(refused(() -> execute(conn, "INSERT INTO tx VALUES (400)")));
      execute(conn, "INSERT INTO tx VALUES (401)");
      conn.commit();
      seen.add(query(conn, "SELECT id FROM tx WHERE id > 100 ORDER BY id"));
    }
    must(seen.get(seen.size() - 1).toString().equals("[[400], [401]]"), seen);
    return seen;
  }

  static Object errors(Address at) throws Exception {
    try (Connection conn = at.connect()) {
      return List.of(
          refused(() -> query(conn, "SELEC 1")),
          refused(() -> query(conn, "SELECT * FROM nowhere")),
          refused(() -> query(conn, "SELECT 1/0")),
          refused(() -> execute(conn, "SELECT 1; SELECT 1/0; SELECT 2")),
          refused(() -> execute(conn, "DO $$ BEGIN RAISE 'own' USING ERRCODE = 'AB123', HINT = 'h', DETAIL = 'd'; END $$")),
          refused(() -> conn.prepareStatement("SELECT nothing").executeQuery()),
          query(conn, "SELECT 'goes on'"));
    }
  }

  static Object batches(Address at) throws Exception {
    List<Object> seen = new ArrayList<>();
    for (String rewrite : new String[] {"false", "true"}) {
      try (Connection conn = at.connect("reWriteBatchedInserts", rewrite)) {
        execute(conn, "DROP TABLE IF EXISTS batched", "CREATE TABLE batched (id int PRIMARY KEY, note text)");
        try (PreparedStatement insert = conn.prepareStatement("INSERT INTO batched VALUES (?, ?)")) {
          for (int turn = 0; turn < 2; turn++) {
            for (int n = 0; n < 1000; n++) {
              insert.setInt(1, turn * 1000 + n);
              insert.setString(2, "n" + n);
              insert.addBatch();
            }
            seen.add(Arrays.stream(insert.executeBatch()).distinct().count());
          }
          for (int n : new int[] {5000, 1, 5001}) {
            insert.setInt(1, n);
            insert.addBatch();
          }
          try {
            insert.executeBatch();
            throw new AssertionError("not refused");
          } catch (BatchUpdateException error) {
            seen.add(error.getSQLState() + Arrays.toString(error.getUpdateCounts()));
          }
        }
        try (PreparedStatement insert = conn.prepareStatement("INSERT INTO batched VALUES (?, 'k')", Statement.RETURN_GENERATED_KEYS)) {
          insert.setInt(1, 7000);
          insert.executeUpdate();
          try (ResultSet keys = insert.getGeneratedKeys()) {
            seen.add(rows(keys));
          }
        }
        try (Statement several = conn.createStatement()) {
          several.addBatch("UPDATE batched SET note = 'x' WHERE id < 10");
          several.addBatch("DELETE FROM batched WHERE id < 5");
          seen.add(Arrays.toString(several.executeBatch()));
        }
        seen.add(query(conn, "SELECT count(*), min(id), max(id) FROM batched"));
      }
    }
    return seen;
  }

  static Object cursors(Address at) throws Exception {
    List<Object> seen = new ArrayList<>();
    try (Connection conn = at.connect()) {
      conn.setAutoCommit(false);
      try (PreparedStatement statement = conn.prepareStatement("SELECT n, 'ü' || n FROM generate_series(1, ?) n")) {
        for (int turn = 0; turn < 8; turn++) {
          statement.setInt(1, 100);
          statement.setFetchSize(7);
          try (ResultSet set = statement.executeQuery()) {
            seen.add(rows(set));
          }
        }
        try (ResultSet set = statement.executeQuery()) {
          set.next();  // and not to the end
          seen.add(set.getString(2));
        }
        conn.commit();
      }
      try (CallableStatement call = conn.prepareCall("{? = call upper(?)}")) {
        call.registerOutParameter(1, Types.VARCHAR);
        call.setString(2, "zürich");
        call.execute();
        seen.add(call.getString(1));
      }
      conn.commit();
    }
    return seen;
  }

  static Object copies(Address at) throws Exception {
    List<Object> seen = new ArrayList<>();
    try (Connection conn = at.connect()) {
      execute(conn, "DROP TABLE IF EXISTS copied", "CREATE TABLE copied (id int PRIMARY KEY, note text)");
      CopyManager copies = conn.unwrap(PGConnection.class).getCopyAPI();
      StringBuilder lines = new StringBuilder();
      for (int n = 0; n < 3000; n++) lines.append(n).append("\tü").append(n).append("\n");
      byte[] bytes = lines.toString().getBytes(StandardCharsets.UTF_8);
      seen.add(copies.copyIn("COPY copied FROM STDIN", new ByteArrayInputStream(bytes)));
      seen.add(refused(() -> copies.copyIn("COPY copied FROM STDIN", new ByteArrayInputStream(bytes))));
      CopyIn given = copies.copyIn("COPY copied FROM STDIN");
      given.writeToCopy("9999\tgiven up\n".getBytes(), 0, 14);
      given.cancelCopy();
      ByteArrayOutputStream out = new ByteArrayOutputStream();
      seen.add(copies.copyOut("COPY (SELECT * FROM copied ORDER BY id) TO STDOUT", out));
      must(Arrays.equals(out.toByteArray(), bytes), "what was copied out");
      seen.add(query(conn, "SELECT count(*) FROM copied"));
    }
    return seen;
  }

  // It calls functions by their numbers, with FunctionCall messages.
  static Object largeObjects(Address at) throws Exception {
    try (Connection conn = at.connect()) {
      conn.setAutoCommit(false);
      LargeObjectManager objects = conn.unwrap(PGConnection.class).getLargeObjectAPI();
      long oid = objects.createLO();
      byte[] bytes = "ü and more ".repeat(2000).getBytes(StandardCharsets.UTF_8);
      try (LargeObject object = objects.open(oid, LargeObjectManager.WRITE); OutputStream out = object.getOutputStream()) {
        out.write(bytes);
      }
      conn.commit();
      try (LargeObject object = objects.open(oid, LargeObjectManager.READ); InputStream in = object.getInputStream()) {
        must(Arrays.equals(in.readAllBytes(), bytes), "what was written");
      }
      objects.unlink(oid);
      conn.commit();
      return bytes.length;
    }
  }

  static Object listens(Address at) throws Exception {
    List<Object> heard = new ArrayList<>();
    try (Connection conn = at.connect(); Connection other = at.connect()) {
      execute(conn, "LISTEN \"Kanal ü\"");
      execute(other, "NOTIFY \"Kanal ü\", 'one'", "NOTIFY \"Kanal ü\", 'two'");
      long deadline = System.nanoTime() + TimeUnit.SECONDS.toNanos(10);
      while (heard.size() < 2 && System.nanoTime() < deadline) {
        for (PGNotification each : conn.unwrap(PGConnection.class).getNotifications(200)) {
          heard.add(each.getName() + each.getParameter());
        }
      }
      execute(conn, "UNLISTEN *");
      must(heard.size() == 2, heard);
    }
    return heard;
  }

  static Object settings(Address at) throws Exception {
    List<Object> seen = new ArrayList<>();
    try (Connection conn = at.connect(); Connection other = at.connect()) {
      String shown = "SELECT current_setting('search_path'), current_setting('TimeZone'), current_setting('work_mem')";
      Object first = query(other, shown);
      conn.setSchema("pg_catalog");
      execute(conn, "SET TIME ZONE 'Asia/Tokyo'", "SET work_mem = '7MB'");
      for (int n = 0; n < 10; n++) {
        seen.add(query(conn, shown));
        must(query(other, shown).equals(first), "another client's settings");
      }
      conn.setClientInfo("ApplicationName", "renamed");
      seen.add(query(conn, "SHOW application_name"));
      execute(conn, "RESET ALL");
      seen.add(query(conn, shown));
    }
    return seen;
  }

  static Object metadata(Address at) throws Exception {
    List<Object> seen = new ArrayList<>();
    try (Connection conn = at.connect()) {
      execute(conn, "DROP TABLE IF EXISTS described", "CREATE TABLE described (id serial PRIMARY KEY, note text NOT NULL)");
      seen.add(rows(conn.getMetaData().getTables(null, "public", "described", null)));
      seen.add(rows(conn.getMetaData().getColumns(null, "public", "described", null)));
      seen.add(rows(conn.getMetaData().getPrimaryKeys(null, "public", "described")));
      try (PreparedStatement statement = conn.prepareStatement("SELECT * FROM described WHERE id = ?")) {
        seen.add(statement.getMetaData().getColumnTypeName(2) + statement.getParameterMetaData().getParameterTypeName(1));
      }
    }
    return seen;
  }

  static Object cancels(Address at) throws Exception {
    List<Object> seen = new ArrayList<>();
    try (Connection conn = at.connect(); Statement statement = conn.createStatement(); Connection look = direct.connect()) {
      statement.setQueryTimeout(1);
      seen.add(refused(() -> statement.execute("SELECT pg_sleep(34)")));
      statement.setQueryTimeout(0);
      ExecutorService executor = Executors.newSingleThreadExecutor();
      Future<String> ended = executor.submit(() -> refused(() -> statement.execute("SELECT pg_sleep(35)")));
      String running = "SELECT FROM pg_stat_activity WHERE state = 'active' AND query = 'SELECT pg_sleep(35)'"
          + " AND datname = current_database()";
      while (query(look, running).isEmpty()) Thread.sleep(10);
      statement.cancel();
      seen.add(ended.get(10, TimeUnit.SECONDS));
      executor.shutdown();
      seen.add(query(conn, "SELECT 'goes on'"));
    }
    return seen;
  }

  // More clients than connections, with the same names for other statements.
  static Object crowd(Address at) throws Exception {
    ExecutorService executor = Executors.newCachedThreadPool();
    List<Callable<Void>> clients = new ArrayList<>();
    for (int client = 0; client < 12; client++) {
      int number = client;
      clients.add(() -> {
        try (Connection conn = at.connect(); PreparedStatement statement = conn.prepareStatement("SELECT ?::int * " + number)) {
          conn.setAutoCommit(false);
          for (int n = 0; n < 20; n++) {
            statement.setInt(1, n);
            try (ResultSet set = statement.executeQuery()) {
              must(set.next() && set.getInt(1) == n * number, n);
            }
            conn.commit();
          }
        }
        return null;
      });
    }
    for (Future<Void> each : executor.invokeAll(clients)) each.get();
    executor.shutdown();
    return "done";
  }

  static Object reconnects(Address at) throws Exception {
    List<Object> seen = new ArrayList<>();
    try (Connection conn = at.connect()) {
      conn.setAutoCommit(false);
      seen.add(refused(() -> query(conn, "SELECT pg_terminate_backend(pg_backend_pid())")));
      seen.add(conn.isValid(5));
    }
    try (Connection again = at.connect()) {
      seen.add(query(again, "SELECT 'again'"));
    }
    return seen;
  }

  // -- running them ---------------------------------------------------------------------------------

  static String field(String json, String name) {
    Matcher matcher = Pattern.compile("\"" + name + "\": \"?([^\",}]*)").matcher(json);
    must(matcher.find(), name);
    return matcher.group(1);
  }

  static Address address(String json, String way, int backends) {
    String part = json.substring(json.indexOf("\"" + way + "\""));
    return new Address(field(part, "host"), field(part, "port"), field(part, "user"), field(part, "password"),
        field(part, "database"), backends);
  }

  static String quoted(String text) {
    StringBuilder quoted = new StringBuilder("\"");
    for (char each : text.toCharArray()) {
      if (each == '"' || each == '\\' || each < ' ') quoted.append(String.format("\\u%04x", (int) each));
      else quoted.append(each);
    }
    return quoted.append('"').toString();
  }

  static String tried(Check check, Address at) {
    try {
      return quoted(String.valueOf(check.run(at)));
    } catch (Throwable error) {
      java.io.StringWriter trace = new java.io.StringWriter();
      error.printStackTrace(new java.io.PrintWriter(trace));
      return "{\"failed\": " + quoted(trace.toString()) + "}";
    }
  }

  public static void main(String[] args) throws Exception {
    String json = args[0];
    direct = address(json, "direct", 1);
    Address through = address(json, "through", Integer.parseInt(field(json, "backends")));
    Map<String, Check> checks = new LinkedHashMap<>();
    checks.put("login", Checks::login);
    checks.put("values", Checks::values);
    checks.put("prepared", Checks::prepared);
    checks.put("wanders", Checks::wanders);
    checks.put("many", Checks::many);
    checks.put("transactions", Checks::transactions);
    checks.put("errors", Checks::errors);
    checks.put("batches", Checks::batches);
    checks.put("cursors", Checks::cursors);
    checks.put("copies", Checks::copies);
    checks.put("largeObjects", Checks::largeObjects);
    checks.put("listens", Checks::listens);
    checks.put("settings", Checks::settings);
    checks.put("metadata", Checks::metadata);
    checks.put("cancels", Checks::cancels);
    checks.put("crowd", Checks::crowd);
    checks.put("reconnects", Checks::reconnects);
    List<String> ways = new ArrayList<>();
    for (String way : new String[] {"direct", "through"}) {
      List<String> found = new ArrayList<>();
      for (Map.Entry<String, Check> each : checks.entrySet()) {
        found.add(quoted(each.getKey()) + ": " + tried(each.getValue(), way.equals("direct") ? direct : through));
      }
      ways.add(quoted(way) + ": {" + String.join(", ", found) + "}");
    }
    System.out.write(("{" + String.join(", ", ways) + "}\n").getBytes(StandardCharsets.UTF_8));
    System.out.flush();
    System.exit(0);
  }
}
